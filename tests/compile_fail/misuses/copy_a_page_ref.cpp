// A copied reference would be counted once and released twice.
// wants: use of deleted function '.*Page<.*>::Page\(const .*Page<.*>&\)
PageRef<Full> keep(PageRef<Full>& ref) {
#ifdef MISUSE
    PageRef<Full> copy = ref;
    return copy;
#else
    return std::move(ref);
#endif
}
