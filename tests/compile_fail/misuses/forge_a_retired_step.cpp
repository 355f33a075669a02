// Only the ledger can say that a step has retired.
// wants: Retired::Retired\(.*StepId\).* is private within this context
Retired pretend(StepLedger& ledger) {
#ifdef MISUSE
    return Retired(ledger.oldest());
#else
    return ledger.retire();
#endif
}
