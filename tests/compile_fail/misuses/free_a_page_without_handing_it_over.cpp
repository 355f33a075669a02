// Whoever frees a page must not keep it.
// wants: cannot bind rvalue reference of type '.*FreePage<.*&&' .* to lvalue
void free(FreePage<Full> page, PagePool<Full, Device>& pool) {
#ifdef MISUSE
    pool.give(page);
#else
    pool.give(std::move(page));
#endif
}
