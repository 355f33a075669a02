// A lent page is reclaimed first; the lease itself cannot be sealed.
// wants: no matching function for call to 'seal\(.*InFlight<
SealedPage<Full> share(InFlight<OpenPage<Full>>&& lease, const Retired& done) {
#ifdef MISUSE
    return seal(std::move(lease), done);
#else
    return seal(reclaim(std::move(lease), done), done);
#endif
}
