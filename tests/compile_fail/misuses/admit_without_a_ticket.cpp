// Only a probe that took its pages admits; a wish for pages does not.
// wants: Admission::Admission\(.*Grant&&\)' is private within this context
Prefilling enter(Queued&& request, Admission&& ticket, Slot&& slot) {
#ifdef MISUSE
    static_cast<void>(ticket);
    return admit(std::move(request), Admission(Grant{}), std::move(slot));
#else
    return admit(std::move(request), std::move(ticket), std::move(slot));
#endif
}
