// A transfer writes the pages of a loading request: it is cancelled, and ends with the transfer.
// wants: no matching function for call to 'finish\(.*Loading
Finished end(Loading&& request, Store& store, const Arrived& done) {
#ifdef MISUSE
    static_cast<void>(done);
    return finish(std::move(request), FinishReason::kAbort, store);
#else
    return arrive(cancel(std::move(request), FinishReason::kAbort, store), done, store);
#endif
}
