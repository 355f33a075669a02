// The table may not claim what no code does.
// wants: static assertion failed: the table in events.h and the transitions disagree
namespace tokenspeed::control {
struct Parked {
    RequestBox request;
    std::vector<PageRef> sealed;
};
Next<Queued> verdict(Retract, const Parked&);
#ifndef MISUSE
Queued retract(Parked&& request, Store& store) noexcept;
#endif
static_assert(table::total<Retract>(States<Parked>{}));
}  // namespace tokenspeed::control
