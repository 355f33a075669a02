// What a draft reached is not open again before it is settled.
// wants: no matching function for call to 'extend\(.*DraftKind
InFlight<OpenPage<Full>> write_on(DraftPage<Full>&& page, OpenPage<Full>&& other, StepId step,
                                  StepId later) {
#ifdef MISUSE
    static_cast<void>(other);
    return extend(lend(std::move(page), step), later);
#else
    static_cast<void>(page);
    return extend(lend(std::move(other), step), later);
#endif
}
