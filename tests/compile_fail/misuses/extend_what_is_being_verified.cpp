// Nobody knows where a draft will end: no later step can go on from it.
// wants: no matching function for call to 'extend\(.*Verifying
Stepping go_on(Decoding&& request, StepId step, StepId next, Draft&& draft, Berth&& first,
               Berth&& second) {
#ifdef MISUSE
    static_cast<void>(first);
    return extend(speculate(std::move(request), step, std::move(draft)), next, TokenCount(1),
                  std::move(second));
#else
    static_cast<void>(draft);
    return extend(launch(std::move(request), step, std::move(first)), next, TokenCount(1),
                  std::move(second));
#endif
}
