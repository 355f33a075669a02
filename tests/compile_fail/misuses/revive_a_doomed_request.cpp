// What is doomed lands in Finished or stays; it does not run on.
// wants: no matching function for call to 'extend\(.*Doomed
Ended on_land(Doomed&& request, const Retired& done, Store& store, Berth&& berth) {
#ifdef MISUSE
    static_cast<void>(extend(std::move(request), done.step(), TokenCount(1), std::move(berth)));
#else
    static_cast<void>(berth);
#endif
    return land(std::move(request), done, store);
}
