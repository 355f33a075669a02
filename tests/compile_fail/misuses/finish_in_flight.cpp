// A request in flight owns pages that a step still uses: it can be doomed, not finished.
// wants: no matching function for call to 'finish\(.*Stepping
void stop(Stepping&& request, Store& store, std::vector<Doomed>& doomed) {
#ifdef MISUSE
    static_cast<void>(doomed);
    static_cast<void>(finish(std::move(request), FinishReason::kStop, store));
#else
    doomed.push_back(doom(std::move(request), FinishReason::kStop, store));
#endif
}
