// A slot that a step uses cannot be given away.
// wants: invalid initialization of reference of type '.*Decoding&&'
#ifdef MISUSE
using State = Stepping;
#else
using State = Decoding;
#endif
Parked rest(State&& request, Store& store) {
    return park(std::move(request), store);
}
