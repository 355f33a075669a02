// Its pages cannot be taken while a step uses them.
// wants: no matching function for call to 'retract\(.*Stepping
#ifdef MISUSE
Queued away(Stepping&& request, Store& store) {
    return retract(std::move(request), store);
}
#else
Queued away(Decoding&& request, Store& store) {
    return retract(std::move(request), store);
}
#endif
