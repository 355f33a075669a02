// The proof exists once; a kept copy would outlive the order of steps.
// wants: use of deleted function '.*Retired::Retired\(const .*Retired&\)
void keep(StepLedger& ledger, std::vector<OpenPage<Full>>& pages, PagePool<Full, Device>& pool) {
    Retired done = ledger.retire();
#ifdef MISUSE
    Retired again = done;
#else
    Retired again = std::move(done);
#endif
    SealedPage<Full> page = seal(std::move(pages.back()), again);
    pool.give(std::move(page));
}
