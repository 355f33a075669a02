// What is not there yet cannot be read: a loading request joins no step.
// wants: no matching function for call to 'launch\(.*Loading
Stepping fly(Loading&& request, const Arrived& done, Store& store, std::vector<Swap>& swaps,
             StepId step, Berth&& berth) {
#ifdef MISUSE
    static_cast<void>(done), static_cast<void>(store), static_cast<void>(swaps);
    return launch(std::move(request), step, TokenCount(1), std::move(berth));
#else
    return launch(arrive(std::move(request), done, store, swaps), step, TokenCount(1),
                  std::move(berth));
#endif
}
