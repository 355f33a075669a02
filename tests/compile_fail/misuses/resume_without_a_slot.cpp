// A parked request comes back when there is a slot for it.
// wants: too few arguments to function '.*resume\(
Prefilling back(Parked&& request, Slot&& slot) {
#ifdef MISUSE
    static_cast<void>(slot);
    return resume(std::move(request));
#else
    return resume(std::move(request), std::move(slot));
#endif
}
