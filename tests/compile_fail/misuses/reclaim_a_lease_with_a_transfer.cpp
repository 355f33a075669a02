// That a transfer is over says nothing of a step.
// wants: no matching function for call to 'reclaim\(.*InFlight<
OpenPage<Full> back(InFlight<OpenPage<Full>>&& lease, const Retired& step,
                    const Arrived& transfer) {
#ifdef MISUSE
    static_cast<void>(step);
    return reclaim(std::move(lease), transfer);
#else
    static_cast<void>(transfer);
    return reclaim(std::move(lease), step);
#endif
}
