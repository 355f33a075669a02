// A draft begins with the last token, which is known only at rest.
// wants: cannot bind rvalue reference of type .*Decoding|invalid initialization of reference
Verifying guess_on(Decoding&& request, StepId step, Draft&& draft, Berth&& berth) {
#ifdef MISUSE
    return speculate(launch(std::move(request), step, std::move(berth)), step, std::move(draft));
#else
    static_cast<void>(berth);
    return speculate(std::move(request), step, std::move(draft));
#endif
}
