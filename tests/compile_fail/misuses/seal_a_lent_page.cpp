// A lent page is reclaimed first; the lease itself cannot be sealed.
// wants: invalid initialization of reference of type '.*OpenPage&&' .* from expression of type
// '.*InFlight<
SealedPage share(InFlight<OpenPage>&& lease, const Retired& done) {
#ifdef MISUSE
    return seal(std::move(lease), done);
#else
    return seal(reclaim(std::move(lease), done), done);
#endif
}
