// A step still writes the page: only the proof that it retired gives the page back.
// wants: no matching function for call to '.*PagePool<.*>::give\(.*InFlight<
void free(InFlight<OpenPage<Full>>&& lease, PagePool<Full, Device>& pool, const Retired& done) {
#ifdef MISUSE
    static_cast<void>(done);
    pool.give(std::move(lease));
#else
    pool.give(reclaim(std::move(lease), done));
#endif
}
