// A queued request has no slot and no page: it is admitted first.
// wants: no matching function for call to 'launch\(.*Queued
Stepping fly(Queued&& request, Admission&& ticket, Slot&& slot, StepId step, Berth&& berth) {
#ifdef MISUSE
    static_cast<void>(ticket), static_cast<void>(slot);
    return launch(std::move(request), step, TokenCount(1), std::move(berth));
#else
    return launch(admit(std::move(request), std::move(ticket), std::move(slot)), step,
                  TokenCount(1), std::move(berth));
#endif
}
