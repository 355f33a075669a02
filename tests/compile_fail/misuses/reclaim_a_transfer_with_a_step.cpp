// That a step retired says nothing of a transfer.
// wants: no matching function for call to 'reclaim\(.*InTransit<
OpenPage<Full> back(InTransit<OpenPage<Full>>&& lease, const Retired& step,
                    const Arrived& transfer) {
#ifdef MISUSE
    static_cast<void>(transfer);
    return reclaim(std::move(lease), step);
#else
    static_cast<void>(step);
    return reclaim(std::move(lease), transfer);
#endif
}
