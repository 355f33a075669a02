// A lease moves on to a later step; the page under it cannot be lent anew.
// wants: no matching function for call to 'lend\(.*InFlight<.*OpenKind
InFlight<OpenPage<Full>> again(InFlight<OpenPage<Full>>&& lease, StepId later) {
#ifdef MISUSE
    return lend(std::move(lease), later);
#else
    return extend(std::move(lease), later);
#endif
}
