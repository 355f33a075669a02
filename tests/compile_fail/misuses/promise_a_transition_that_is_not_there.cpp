// The table may not claim what no code does.
// wants: static assertion failed: the table in events.h and the transitions disagree
namespace tokenspeed::control {
struct Dormant {
    RequestBox request;
    std::vector<PageRef<Full>> sealed;
};
Next<Queued> verdict(Retract, const Dormant&);
#ifndef MISUSE
Queued retract(Dormant&& request, Store& store) noexcept;
#endif
static_assert(table::total<Retract>(States<Dormant>{}));
}  // namespace tokenspeed::control
