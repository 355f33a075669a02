// What happens to requests that hold pages: each transition consumes the state it leaves.
#pragma once

#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "room.h"
#include "states.h"

namespace tokenspeed::control {

// --- launching ----------------------------------------------------------------------------------

// Room made before a launch, so that launching itself cannot fail.
class Berth {
  public:
    // For what a step lends that feeds `chunk` tokens, beside what is lent already.
    Berth(const Prefilling& request, TokenCount chunk);
    explicit Berth(const Decoding& request);
    Berth(const Stepping& request, TokenCount chunk);

  private:
    Berth(const PerGroup<Resting>& pages, std::size_t touched);
    friend Stepping launch(Prefilling&&, StepId, TokenCount, Berth&&) noexcept;
    friend Stepping launch(Decoding&&, StepId, Berth&&) noexcept;
    friend Stepping extend(Stepping&&, StepId, TokenCount, Berth&&) noexcept;
    PerGroup<Flying> room_;
};

// Lends what the step writes: the tail page and the promised pages that `chunk` tokens reach, and
// a page for the state of a recurrence if one was promised and the chunk ends where one is kept.
[[nodiscard]] Stepping launch(Prefilling&& request, StepId step, TokenCount chunk,
                              Berth&& berth) noexcept;
// One token.
[[nodiscard]] Stepping launch(Decoding&& request, StepId step, Berth&& berth) noexcept;
// Overlap: a later step goes on where the one in flight will end.
[[nodiscard]] Stepping extend(Stepping&& request, StepId next, TokenCount chunk,
                              Berth&& berth) noexcept;

// A draft, and the room that its launch needs: made before, so that launching cannot fail. At least
// one token.
class Draft {
  public:
    Draft(const Decoding& request, std::vector<std::int32_t>&& tokens);

  private:
    friend Verifying speculate(Decoding&&, StepId, Draft&&) noexcept;
    std::vector<std::int32_t> tokens_;
    PerGroup<Guessed> room_;
};
// Feeds the last token and the draft: lends the tail page and the promised pages that they reach.
// No state of a recurrence can be rolled back: models that have one get no drafts.
[[nodiscard]] Verifying speculate(Decoding&& request, StepId step, Draft&& draft) noexcept;

// Pages of a group that the request lacks to write its first `end` tokens.
template <class G>
PageCount lacks(const Prefilling& request, TokenCount end) noexcept;
template <class G>
PageCount lacks(const Decoding& request, TokenCount end) noexcept;
template <class G>
PageCount lacks(const Stepping& request, TokenCount end) noexcept;
// Promises it one more, for which there must be room.
template <class G, class State>
void grow(State& request, FreePage<G>&& page) noexcept {
    request.pages.template of<G>().promised.push_back(std::move(page));
}
template <class G, class State>
void reserve_growth(State& request) {
    make_room_for(request.pages.template of<G>().promised, 1);
}

// --- landing ------------------------------------------------------------------------------------

// A cached page took the place of an equal one the request had written.
struct Swap {
    GroupKind group;
    std::int32_t index;
    std::int32_t page;
};

// A step of the request retired, after which `written` tokens have their KV: full pages are
// sealed and shelved, and the request is at rest unless a later step of it is in flight.
using Landed = std::variant<Prefilling, Decoding, Stepping>;
[[nodiscard]] Landed land(Stepping&& request, const Retired& done, TokenCount written, Store& store,
                          std::vector<Swap>& swaps) noexcept;
// Makes the room that `land` needs, so that a failure comes before anything has moved.
void reserve_landing(Stepping& request, std::vector<Swap>& swaps);

// The step's samples for the request, one for its last token and one for each of its draft's, or
// for its first so many, if no more were run: sample i counts if the i before it equal the draft's
// first i, and none of those ended it.
[[nodiscard]] Verified verify(const Verifying& request, std::span<const std::int32_t> samples,
                              TokenCount context_max) noexcept;
// Its step retired: the tokens that count are appended, pages they fill are sealed and shelved, and
// pages that only wrong guesses reached are free.
[[nodiscard]] Decoding land(Verifying&& request, const Retired& done, const Verified& verified,
                            Store& store, std::vector<Swap>& swaps) noexcept;
void reserve_landing(Verifying& request, std::vector<Swap>& swaps);

using Ended = std::variant<Doomed, Finished>;
[[nodiscard]] Ended land(Doomed&& request, const Retired& done, Store& store) noexcept;

// --- transfers ----------------------------------------------------------------------------------

// Room made, while its last step flies, for a request's pages to depart.
class Manifest {
  public:
    explicit Manifest(const Stepping& request);

  private:
    friend Sending send(Decoding&&, FinishReason, TransferId, Manifest&&, Store&) noexcept;
    PerGroup<Departures> room_;
};
[[nodiscard]] Sending send(Decoding&& request, FinishReason reason, TransferId transfer,
                           Manifest&& manifest, Store& store) noexcept;

// The transfer is over and brought what it should.
[[nodiscard]] Prefilling arrive(Loading&& request, const Arrived& done, Store& store,
                                std::vector<Swap>& swaps) noexcept;
[[nodiscard]] Prefilling arrive(Receiving&& request, const Arrived& done, Store& store,
                                std::vector<Swap>& swaps) noexcept;
[[nodiscard]] Finished arrive(Sending&& request, const Arrived& done, Store& store) noexcept;
[[nodiscard]] Finished arrive(Cancelled&& request, const Arrived& done, Store& store) noexcept;
void reserve_arrival(Loading& request, std::vector<Swap>& swaps);
void reserve_arrival(Receiving& request, std::vector<Swap>& swaps);

// The transfer is over and brought nothing: what it should have brought is computed.
[[nodiscard]] Queued fail(Loading&& request, const Arrived& done, Store& store) noexcept;
[[nodiscard]] Queued fail(Receiving&& request, const Arrived& done, Store& store) noexcept;
[[nodiscard]] Finished fail(Sending&& request, const Arrived& done, Store& store) noexcept;
[[nodiscard]] Finished fail(Cancelled&& request, const Arrived& done, Store& store) noexcept;

// --- giving way ---------------------------------------------------------------------------------

// The slot goes back, the pages stay.
[[nodiscard]] Parked park(Decoding&& request, Store& store) noexcept;
// In a new slot it feeds its last token again, which that slot has never seen.
[[nodiscard]] Prefilling resume(Parked&& request, Slot&& slot) noexcept;

// Back to the queue: tokens kept, sealed pages left to the cache.
[[nodiscard]] Queued retract(Prefilling&& request, Store& store) noexcept;
[[nodiscard]] Queued retract(Decoding&& request, Store& store) noexcept;
[[nodiscard]] Queued retract(Parked&& request, Store& store) noexcept;

// --- leaving ------------------------------------------------------------------------------------

[[nodiscard]] Finished finish(Queued&& request, FinishReason reason) noexcept;
[[nodiscard]] Finished finish(Prefilling&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Finished finish(Decoding&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Finished finish(Parked&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Doomed doom(Stepping&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Doomed doom(Verifying&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Cancelled cancel(Loading&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Cancelled cancel(Receiving&& request, FinishReason reason, Store& store) noexcept;

}  // namespace tokenspeed::control
