// A copied reference would be counted once and released twice.
// wants: use of deleted function '.*Page<.*>::Page\(const .*Page<.*>&\) \[with Kind = .*RefKind\]
PageRef keep(PageRef& ref) {
#ifdef MISUSE
    PageRef copy = ref;
    return copy;
#else
    return std::move(ref);
#endif
}
