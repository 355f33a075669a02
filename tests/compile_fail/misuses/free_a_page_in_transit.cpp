// A transfer still touches the page: only the proof that it is over gives the page back.
// wants: no matching function for call to '.*PagePool<.*>::give\(.*InTransit<
void free(InTransit<OpenPage<Full>>&& lease, PagePool<Full, Device>& pool, const Arrived& done) {
#ifdef MISUSE
    static_cast<void>(done);
    pool.give(std::move(lease));
#else
    pool.give(reclaim(std::move(lease), done));
#endif
}
