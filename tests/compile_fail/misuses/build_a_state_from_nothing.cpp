// A state without its request and its slot does not exist.
// wants: could not convert .* to '.*RequestBox'
Decoding begin(RequestBox&& box, Slot&& slot) {
#ifdef MISUSE
    static_cast<void>(box), static_cast<void>(slot);
    return Decoding{};
#else
    return Decoding{std::move(box), std::move(slot), {}, {}};
#endif
}
