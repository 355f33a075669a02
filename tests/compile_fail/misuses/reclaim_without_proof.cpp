// A lease ends with its step, not when somebody wants the page.
// wants: no matching function for call to 'reclaim\(.*InFlight<
OpenPage<Full> back(InFlight<OpenPage<Full>>&& lease, const Retired& done) {
#ifdef MISUSE
    return reclaim(std::move(lease), lease.until());
#else
    return reclaim(std::move(lease), done);
#endif
}
