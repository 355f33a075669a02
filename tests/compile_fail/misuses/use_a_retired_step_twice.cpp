// The proof exists once; a kept copy would outlive the order of steps.
// wants: use of deleted function '.*Retired::Retired\(const .*Retired&\)
void keep(StepLedger& ledger, std::vector<OpenPage>& pages, PagePool& pool) {
    Retired done = ledger.retire();
#ifdef MISUSE
    Retired again = done;
#else
    Retired again = std::move(done);
#endif
    SealedPage page = seal(std::move(pages.back()), again);
    pool.give(std::move(page));
}
