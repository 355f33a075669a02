// What a draft wrote is sealed only as far as it was verified.
// wants: no matching function for call to 'seal\(.*DraftKind
SealedPage<Full> share(DraftPage<Full>&& page, const Retired& done, const Verified& verified) {
#ifdef MISUSE
    static_cast<void>(verified);
    return seal(std::move(page), done);
#else
    static_cast<void>(done);
    return seal(std::get<FilledPage<Full>>(settle(std::move(page), 0, TokenCount(32), verified)));
#endif
}
