// A parked request has no slot to write from.
// wants: no matching function for call to 'launch\(.*Parked
Stepping fly(Parked&& request, Slot&& slot, StepId step, Berth&& berth) {
#ifdef MISUSE
    static_cast<void>(slot);
    return launch(std::move(request), step, TokenCount(1), std::move(berth));
#else
    return launch(resume(std::move(request), std::move(slot)), step, TokenCount(1),
                  std::move(berth));
#endif
}
