// The ledger retires its oldest step; no call names another.
// wants: no matching function for call to '.*StepLedger::retire\(.*StepId
Retired commit(StepLedger& ledger, StepId step) {
#ifdef MISUSE
    return ledger.retire(step);
#else
    static_cast<void>(step);
    return ledger.retire();
#endif
}
