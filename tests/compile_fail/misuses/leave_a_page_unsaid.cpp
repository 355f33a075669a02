// There is no empty page to start from.
// wants: no matching function for call to '.*Page<.*OpenKind.*>::Page\(\)'
OpenPage<Full> start(FreePage<Full>&& page) {
#ifdef MISUSE
    OpenPage<Full> fresh;
    static_cast<void>(page);
    return fresh;
#else
    return open(std::move(page));
#endif
}
