// What flies is not at rest: a later step can only extend it.
// wants: no matching function for call to 'launch\(.*Stepping
Stepping fly(Decoding&& request, StepId step, StepId next, Berth&& first, Berth&& second) {
#ifdef MISUSE
    return launch(launch(std::move(request), step, std::move(first)), next, std::move(second));
#else
    return extend(launch(std::move(request), step, std::move(first)), next, TokenCount(1),
                  std::move(second));
#endif
}
