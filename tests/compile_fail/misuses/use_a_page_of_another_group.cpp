// A page belongs to one cache group, and goes back to that group's pool.
// wants: no matching function for call to '.*PagePool<.*Window, .*Device>::give\(.*Full
void free(FreePage<Full>&& page, PagePool<Full, Device>& full, PagePool<Window, Device>& window) {
#ifdef MISUSE
    static_cast<void>(full);
    window.give(std::move(page));
#else
    static_cast<void>(window);
    full.give(std::move(page));
#endif
}
