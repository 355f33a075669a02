// The number of a page is not the right to it.
// wants: Page<Kind>::Page\(.*PageId\).* is private within this context
std::optional<FreePage> get(PagePool& pool) {
#ifdef MISUSE
    static_cast<void>(pool);
    return FreePage(PageId(3));
#else
    return pool.take();
#endif
}
