// No code may do what the table rejects.
// wants: static assertion failed: the table in events.h and the transitions disagree
namespace tokenspeed::control {
struct Parked {
    RequestBox request;
    std::vector<PageRef> sealed;
};
Rejected verdict(Stop, const Parked&);
#ifdef MISUSE
Finished finish(Parked&& request, FinishReason reason, Store& store) noexcept;
#endif
static_assert(table::total<Stop>(States<Parked>{}));
}  // namespace tokenspeed::control
