// A reference is one share of a page, not the page.
// wants: no matching function for call to '.*PagePool<.*>::give\(.*RefKind
void free(std::vector<PageRef<Full>>&& run, Store& store) {
#ifdef MISUSE
    store.index.give<Full>(std::move(run.back()));
#else
    store.index.release(std::move(run));
#endif
}
