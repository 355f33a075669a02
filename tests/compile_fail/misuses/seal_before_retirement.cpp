// What a step in flight writes is not yet what its hash says.
// wants: too few arguments to function '.*SealedPage .*seal\(
SealedPage share(OpenPage&& page, const Retired& done) {
#ifdef MISUSE
    static_cast<void>(done);
    return seal(std::move(page));
#else
    return seal(std::move(page), done);
#endif
}
