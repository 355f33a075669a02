// What a step in flight writes is not yet what its hash says.
// wants: no matching function for call to 'seal\(.*OpenKind.*&>::type\)'
SealedPage<Full> share(OpenPage<Full>&& page, const Retired& done) {
#ifdef MISUSE
    static_cast<void>(done);
    return seal(std::move(page));
#else
    return seal(std::move(page), done);
#endif
}
