// The scheduler: decides what each step runs and who holds which page. One thread at a time.
//
//     plan()    applies the events that arrived, then drafts rows (decode, prefill, admissions)
//               and launches them as one step
//     commit()  retires the oldest step, hands its tokens to their requests, ends those that stop
//
// The same calls give the same plans. Requests that run go by priority, then arrival; waiting ones
// and prompts not yet computed take turns: priority, tokens given to the tenant, arrival.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <variant>
#include <vector>

#include "admission.h"
#include "containers.h"
#include "draft_source.h"
#include "errors.h"
#include "fair_queue.h"
#include "fingerprint.h"
#include "floor.h"
#include "outputs.h"
#include "overloaded.h"
#include "plan.h"
#include "policy.h"
#include "requests.h"
#include "states.h"
#include "step_time.h"
#include "steps.h"
#include "transfers.h"
#include "transitions.h"

namespace tokenspeed::control {

struct Config {
    std::vector<GroupConfig> groups;  // at most one of each kind
    std::int32_t page_size;
    std::int32_t slots_max;
    std::int32_t step_tokens_max;
    std::int32_t context_max;
    std::int32_t overlap_depth;
    bool prefix_cache;
    CachePolicy cache_policy;
    std::optional<double> tps_floor;               // the least tokens a second of whoever decodes
    std::optional<std::int64_t> queue_timeout_us;  // the longest wait before a request is refused
    std::int32_t step_drafts_max;                  // drafted tokens of a step; 0: no drafts
    std::int32_t step_proposals_max = 0;           // of a draft model in a step; 0: there is none
    std::int32_t proposal_length_max = 0;          // of these, for one row
    std::int32_t proposal_window = 0;              // what it reads of a request first; 0: all along
    std::size_t draft_memory_size_bytes = std::size_t{512} << 20;  // of texts that drafts come from
};

class Scheduler {
  public:
    // Throws ConfigError. Drafts come from `drafts`, or else from a `Drafter`.
    explicit Scheduler(const Config& config, std::unique_ptr<DraftSource> drafts = nullptr);
    Scheduler(const Scheduler&) = delete;
    Scheduler& operator=(const Scheduler&) = delete;
    ~Scheduler();

    // Queued until the next plan. Throws InvalidParameter or ContextOverflow.
    void submit(Submission&& wish);
    // Queued until the next plan; an unknown id may just have finished, and is ignored.
    void abort(RequestId request);

    // Queued until the next plan: a transfer is over, and brought its pages or failed. Throws
    // EngineError unless it is under way.
    void transferred(TransferId transfer, bool complete);

    // Nothing when nothing can run now, or as many steps are in flight as may be. A plan without
    // rows starts transfers. Time is `now_us`, in microseconds that never go back.
    [[nodiscard]] std::optional<Plan> plan(std::int64_t now_us);
    // `cuts` names drafts whose last guesses were not run: samples behind those mean nothing.
    // Throws EngineError unless `step` is the oldest in flight, `tokens` are its samples, no row
    // has more proposals than it was to get and each cut leaves less than its draft. Whatever is
    // proposed, no output changes.
    void commit(StepId step, std::span<const std::int32_t> tokens, std::int64_t now_us,
                const Proposed& proposed = {}, std::span<const CutDraft> cuts = {});
    [[nodiscard]] Outcome take_outcome();

    // Prompt and output so far. Throws InvalidParameter if the request is not live.
    std::vector<std::int32_t> tokens(RequestId request) const;
    Stats stats() const;

    // A step took so long elsewhere: for knowing the machine before the first request.
    void observe(const StepWork& work, std::int64_t took_us) noexcept {
        model_.observe(work, took_us);
    }
    const StepTimeModel& step_times() const noexcept { return model_; }
    // The longest interval between two tokens that keeps the promise to a user of so long a
    // context, in microseconds; nothing where no floor is held.
    std::optional<double> interval_bound_us(TokenCount context) const noexcept;

    // Frees every cached page that nothing refers to; true if that is all of them.
    bool flush_cache();
    void record_cache_events(bool on) { store_.index.record(on); }
    CacheEvents take_cache_events() { return store_.index.take_events(); }

    // Checks every invariant of ownership. Throws EngineError naming the first that is broken.
    void audit() const;
    // For tests that explore: what this scheduler will do, apart from the names of things.
    Fingerprint fingerprint() const;

  private:
    // One request's part of a step.
    struct Row {
        SlotId slot;
        TokenCount start;
        TokenCount count;
        bool samples;
        std::vector<std::int32_t> draft = {};  // of the tokens, those that are guesses
        std::int32_t propose = 0;              // tokens the draft model shall propose then
        std::int32_t reads = 0;                // and tokens that it is to read for it
        double expected = 1;                   // tokens it is expected to give
        std::size_t cut = 0;                   // of these, so many at the end were not run

        std::size_t sample_count() const noexcept { return samples ? 1 + draft.size() : 0; }
        // Tokens of it that its request is known to have.
        std::int32_t known() const noexcept {
            return count.value - static_cast<std::int32_t>(draft.size());
        }
    };
    template <class G>
    using Stores = std::vector<Storing<G>>;
    struct Flight {
        StepId step;
        std::vector<Row> rows;
        std::size_t samples;
        PerGroup<Stores> stores;
        StepWork work;
        std::int64_t began_us;
    };
    // Where an id leads: to the slot whose state holds it, or to its place in a line.
    struct Place {
        Order order;
        LineId line;
        std::optional<SlotId> slot;
        std::optional<BranchId> branch;  // once it is queued
        TokenCount outputs;              // once it ended
        TokenCount drafted, accepted;    // guesses made for it, and those that were right
    };
    // An abort is of the request that had the id when it came.
    struct Aborted {
        RequestId request;
        Order order;
    };
    struct Report {
        TransferId transfer;
        bool complete;
    };
    using Live = std::variant<Queued, Loading, Receiving, Prefilling, Decoding, Stepping, Verifying,
                              Parked, Sending, Doomed, Cancelled>;
    using Travelling = std::variant<Loading, Receiving, Sending, Cancelled>;

    // No time is so late, and no time-out so long, that their sum could not be told.
    static constexpr std::int64_t kTimeMaxUs = std::numeric_limits<std::int64_t>::max() / 4;
    void pass_to(std::int64_t now_us) noexcept {
        now_us_ = std::min(std::max(now_us_, now_us), kTimeMaxUs);
    }

    // --- events ---
    void apply_events();
    void apply(Queued&& submitted);
    void apply(Aborted aborted);
    void apply(const Report& report);
    Live extract(const Place& place) noexcept;
    Travelling extract_travelling(SlotId slot) noexcept;
    // A transfer brought it in: it runs from now on.
    void take_in(Prefilling&& request) noexcept;

    // --- endings: each reports the one terminal event of its request ---
    void reserve_endings(std::size_t more);
    void conclude(const Finished& finished) noexcept;
    void conclude(Doomed&& doomed) noexcept;
    void conclude(Cancelled&& cancelled) noexcept;
    void report_end(RequestId request, FinishReason reason, std::int32_t retry_ms = 0) noexcept;
    void leave_order(SlotId slot) noexcept;
    void forget(RequestId request) noexcept;

    // --- judgement ---
    LineId line_of(RequestId request) const noexcept {
        return places_.find(request.value)->second.line;
    }
    LineId line_of(SlotId slot) const noexcept {
        return lines_[static_cast<std::size_t>(slot.value)];
    }
    void wait(const Request& request);
    TokenCount uncached_of(const Request& request) const noexcept;
    StepWork drafted_work() const noexcept;
    bool floor_admits(const Request& newcomer, std::optional<SlotId> but) const noexcept;
    TokenCount chunk_within_floor(TokenCount context, TokenCount most) const noexcept;
    PageCount reserve_for(const Request& newcomer);
    std::size_t cheapest_victim(std::size_t rank) const noexcept;
    double cost_of_return(SlotId slot) const noexcept;
    std::optional<std::int64_t> expected_wait_us(const Request& newcomer) const noexcept;
    void refuse(Queued&& request, std::optional<std::int64_t> wait_us);
    void refuse_late();

    // --- drafting a step ---
    enum class Room { kReady, kWait, kGone };
    void make_slot();
    void draft_decodes();
    void draft_guesses();
    void draft_proposals(std::size_t first);
    bool prompts_wait() const noexcept;
    TokenCount reach_for(SlotId slot, TokenCount start, TokenCount guesses);
    void draft_prefills();
    std::optional<FairQueue::Turn> next_turn(std::size_t& rank) const noexcept;
    bool seat_next(const std::optional<FairQueue::Turn>& before);
    bool seat_parked(const Order& order);
    bool seat_queued(const Order& order);
    void draft(SlotId slot, TokenCount start, TokenCount count, bool samples);
    Room draft_chunk(std::size_t rank);
    TokenCount prompt_left(SlotId slot) const noexcept;
    void undraft(SlotId slot) noexcept;
    TokenCount chunk_from(TokenCount fed, const Request& request) const noexcept;
    TokenCount last_reusable(const Request& request) const noexcept;
    const Request& running(SlotId slot) const noexcept;
    bool decodes_next(const Stepping& request) const noexcept;
    Room find_pages(std::size_t rank, TokenCount end);
    template <class G>
    Room find_pages(std::size_t rank, TokenCount end);
    Room make_way(std::size_t rank);
    void promise_checkpoint(SlotId slot, TokenCount end);
    void retract_from(SlotId slot);
    void retract_parked(const Order& order);
    void prepare_return(const Request& request);
    void take_back(Queued&& retracted) noexcept;
    void park_from(SlotId slot);
    void line_up(SlotId slot) noexcept;
    void bind(SlotId slot, RequestId request) noexcept;
    template <class State>
    void tell_table(const State& request) noexcept;
    void reserve_seat(const Request& request);
    void seat(Queued&& queued, Admission&& ticket) noexcept;
    void seat(Queued&& queued, LoadAdmission&& ticket) noexcept;
    void seat(Queued&& queued, ReceiveAdmission&& ticket) noexcept;
    void count_admission(const Request& request, bool first) noexcept;
    std::int32_t tell_transfer(TransferId transfer, TransferKind kind, RequestId request) noexcept;

    // --- launching it ---
    Plan launch_drafts();
    void launch_stores(Flight& flight) noexcept;
    void launch_row(const Row& row, std::int32_t index, Berth&& berth, Plan& plan) noexcept;
    void speculate_row(const Row& row, std::int32_t index, Draft&& draft, Plan& plan) noexcept;
    void tell_row(const Row& row, std::int32_t index, TokenCount position, Plan& plan) noexcept;
    template <class G>
    void tell_positions(const Row& row, std::size_t base, const auto& lent) noexcept;
    template <class G>
    void tell_pages(const Row& row, const Stepping& request, StepId step) noexcept;

    // --- its return ---
    void check_proposed(const Flight& flight, const Proposed& proposed) const;
    void reserve_commit(const Flight& flight);
    void reserve_proposals(Flight& flight, const Proposed& proposed);
    Proposal proposal_of(SlotId slot) noexcept;
    static void cut_drafts(Flight& flight, std::span<const CutDraft> cuts);
    void tell_swaps(SlotId slot) noexcept;
    void land_row(const Row& row, const Retired& done, std::optional<std::int32_t> token,
                  std::int32_t sample);
    void land_verifying(const Row& row, const Retired& done, std::span<const std::int32_t> samples,
                        std::int32_t first);
    void tell_token(const Request& request, std::int32_t token, std::int32_t sample) noexcept;
    void settle_end(const Request& request) noexcept;
    void hand_over(Decoding&& request, FinishReason reason) noexcept;
    void land_doomed(SlotId slot, const Retired& done) noexcept;
    const Request* find(const Place& place) const noexcept;
    template <class G>
    GroupPlan& news_of() noexcept {
        return news_[static_cast<std::size_t>(G::kKind)];
    }

    TokenCount page_size_;
    TokenCount context_max_;
    std::int32_t step_tokens_max_;
    std::int32_t slots_max_;
    std::int32_t step_drafts_max_;
    std::int32_t step_proposals_max_, proposal_length_max_;  // 0 where there are no drafts
    std::unique_ptr<DraftSource> drafts_;  // none where the configuration allows no drafts
    Store store_;
    StepLedger ledger_;
    TransferLedger transfers_;
    std::int64_t now_us_ = 0;
    // Submissions, aborts and transfers that are over, as they came.
    std::deque<std::variant<Queued, Aborted, Report>> arrivals_;
    std::unordered_map<std::int64_t, Place> places_;  // looked up by id, never iterated
    Roster<Queued> queued_;
    Roster<Parked> parked_;
    Shelf<Loading> loading_;
    Shelf<Receiving> receiving_;
    Shelf<Prefilling> prefilling_;
    Shelf<Decoding> decoding_;
    Shelf<Stepping> stepping_;
    Shelf<Verifying> verifying_;
    Shelf<Sending> sending_;
    Shelf<Doomed> doomed_;
    Shelf<Cancelled> cancelled_;
    StepTimeModel model_;
    Floor floor_;
    FairQueue turns_;
    OutputHistory answers_;
    std::optional<std::int64_t> queue_timeout_us_;
    struct Deadline {
        Order order;
        std::int64_t at_us;
    };
    std::deque<Deadline> deadlines_;  // of those never admitted, as they came
    std::vector<LineId> lines_;       // by slot
    std::vector<Growth> growths_;
    std::optional<std::int64_t> returned_us_;  // when a step returned last to others that run
    bool full_ = false;                        // whoever asked for a slot last was given none
    // Slots of Prefilling, Decoding, Stepping and Verifying by Order.
    std::vector<SlotId> order_;
    std::deque<Flight> flights_;

    // The plan in the making.
    std::vector<Row> rows_;
    std::vector<DraftSource::Row> guesses_;
    std::vector<DraftSource::Ask> asks_;
    std::vector<const Request*> followed_;
    std::int32_t budget_ = 0;
    std::int32_t decode_count_ = 0;
    bool starved_ = false;           // a decode row had to do without its page
    std::optional<SlotId> resting_;  // left out of this plan, so that it can be retracted
    std::vector<bool> served_;       // by slot: its prompt had its turn in this plan

    // Said in the next plan.
    std::array<GroupPlan, kGroupKinds> news_;
    Transfers transfer_news_;
    std::vector<std::int32_t> bound_slots_;
    std::vector<std::int64_t> bound_requests_;
    std::vector<Swap> swaps_;
    std::vector<std::pair<SlotId, Manifest>> manifests_;
    std::vector<std::pair<SlotId, Proposal>> proposals_;  // of the step that returns

    // The head of the queue that did not fit, and the room it wants: no probe before that.
    struct Blocked {
        Order order;
        PageCounts wanted;
    };
    std::optional<Blocked> blocked_;

    Outcome outcome_;
    std::int64_t arrivals_seen_ = 0;
    std::int64_t steps_ = 0, prompt_tokens_ = 0, cached_tokens_ = 0, missed_evicted_tokens_ = 0,
                 missed_unseen_tokens_ = 0, missed_other_salt_tokens_ = 0, missed_tail_tokens_ = 0,
                 output_tokens_ = 0, drafted_tokens_ = 0, accepted_tokens_ = 0,
                 proposed_tokens_ = 0;
    std::int64_t retractions_ = 0, parkings_ = 0, loads_ = 0, refusals_ = 0;
};

}  // namespace tokenspeed::control
