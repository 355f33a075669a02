// Its pages are written by a step in flight: an end dooms it.
// wants: no matching function for call to 'finish\(.*Verifying
Doomed end(Verifying&& request, Store& store) {
#ifdef MISUSE
    return finish(std::move(request), FinishReason::kAbort, store);
#else
    return doom(std::move(request), FinishReason::kAbort, store);
#endif
}
