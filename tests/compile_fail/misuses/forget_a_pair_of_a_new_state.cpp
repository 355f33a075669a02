// A new state stops the build until every event answers for it.
// wants: static assertion failed: an event does not answer for a state
namespace tokenspeed::control {
struct Parked {
    RequestBox request;
    std::vector<PageRef> sealed;
};
#ifndef MISUSE
Rejected verdict(Retract, const Parked&);
#endif
static_assert(table::total<Retract>(States<Queued, Parked>{}));
}  // namespace tokenspeed::control
