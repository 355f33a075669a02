// A new state stops the build until every event answers for it.
// wants: static assertion failed: an event does not answer for a state
namespace tokenspeed::control {
struct Dormant {
    RequestBox request;
    std::vector<PageRef<Full>> sealed;
};
#ifndef MISUSE
Rejected verdict(Retract, const Dormant&);
#endif
static_assert(table::total<Retract>(States<Queued, Dormant>{}));
}  // namespace tokenspeed::control
