// The number of a page is not the right to it.
// wants: Page<Kind, Group, Tier>::Page\(.*PageId.*\).* is private within this context
std::optional<FreePage<Full>> get(PagePool<Full, Device>& pool) {
#ifdef MISUSE
    static_cast<void>(pool);
    return FreePage<Full>(PageId<Full>(3));
#else
    return pool.take();
#endif
}
