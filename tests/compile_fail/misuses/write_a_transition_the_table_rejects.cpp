// No code may do what the table rejects.
// wants: static assertion failed: the table in events.h and the transitions disagree
namespace tokenspeed::control {
struct Dormant {
    RequestBox request;
    std::vector<PageRef<Full>> sealed;
};
Rejected verdict(Stop, const Dormant&);
#ifdef MISUSE
Finished finish(Dormant&& request, FinishReason reason, Store& store) noexcept;
#endif
static_assert(table::total<Stop>(States<Dormant>{}));
}  // namespace tokenspeed::control
