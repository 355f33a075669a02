// That its step retired does not say how far a draft was right.
// wants: no matching function for call to 'land\(.*Verifying
Decoding take_in(Verifying&& request, const Retired& done, const Verified& verified, Store& store,
                 std::vector<Swap>& swaps) {
#ifdef MISUSE
    static_cast<void>(verified);
    return land(std::move(request), done, store, swaps);
#else
    return land(std::move(request), done, verified, store, swaps);
#endif
}
