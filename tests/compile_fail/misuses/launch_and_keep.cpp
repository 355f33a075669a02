// A transition consumes its state: the old one must be handed over.
// wants: cannot bind rvalue reference of type '.*Decoding&&' to lvalue
Stepping fly(Decoding& request, StepId step, Berth&& berth) {
#ifdef MISUSE
    return launch(request, step, std::move(berth));
#else
    return launch(std::move(request), step, std::move(berth));
#endif
}
