// Only the ledger says that a transfer is over.
// wants: Arrived::Arrived\(.*TransferId\)' is private within this context
Arrived over(TransferLedger& ledger, SlotId slot) {
#ifdef MISUSE
    static_cast<void>(ledger), static_cast<void>(slot);
    return Arrived(TransferId(0));
#else
    return ledger.arrive(slot);
#endif
}
