// Nobody's content is not worth a transfer.
// wants: static assertion failed: only open pages and references travel
auto leave(FreePage<Full>&& page, TransferId transfer) {
#ifdef MISUSE
    return depart(std::move(page), transfer);
#else
    return depart(open(std::move(page)), transfer);
#endif
}
