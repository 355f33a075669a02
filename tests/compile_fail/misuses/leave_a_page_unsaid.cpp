// There is no empty page to start from.
// wants: use of deleted function '.*Page<.*>::Page\(\) \[with Kind = .*OpenKind\]
OpenPage start(FreePage&& page) {
#ifdef MISUSE
    OpenPage fresh;
    static_cast<void>(page);
    return fresh;
#else
    return open(std::move(page));
#endif
}
