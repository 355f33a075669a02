// The scheduler as a whole: what it may be made of, how it ends, how its requests end, and where it
// stands.
#include "scheduler.h"

#include <algorithm>
#include <array>
#include <limits>

#include "drafter.h"
#include "room.h"

namespace tokenspeed::control {

namespace {

const char* name_of(GroupKind kind) {
    constexpr std::array names{"full", "window", "latent", "recurrent"};
    return names[static_cast<std::size_t>(kind)];
}

void check_group(const Config& config, const GroupConfig& group) {
    const std::string name = std::string("the ") + name_of(group.kind) + " cache group";
    if (group.pages < 1) {
        throw ConfigError(name + " must have at least 1 page, but has " + text(group.pages));
    }
    if (group.host_pages < 0) {
        throw ConfigError(name + " must have at least 0 pages on the host, but has " +
                          text(group.host_pages));
    }
    if (static_cast<std::int64_t>(group.pages) * config.page_size >
        std::numeric_limits<std::int32_t>::max()) {
        throw ConfigError("pages * page_size must be below 2^31, but is " + text(group.pages) +
                          " * " + text(config.page_size) + "; lower --kv-cache-size-bytes");
    }
    if (group.kind == GroupKind::kWindow) {
        if (group.window < 1) {
            throw ConfigError("the window must hold at least 1 token, but holds " +
                              text(group.window));
        }
        // What one request may hold at once: its window, and the chunks of all steps in flight.
        const std::int64_t tokens = std::min<std::int64_t>(
            config.context_max, group.window + static_cast<std::int64_t>(config.overlap_depth + 1) *
                                                   config.step_tokens_max);
        const std::int64_t least = (tokens - 1) / config.page_size + 2;
        if (group.pages < least) {
            throw ConfigError("the window cache group must have at least " + text(least) +
                              " pages, for the window and the tokens of a step, but has " +
                              text(group.pages) +
                              "; raise --kv-cache-size-bytes or lower --max-step-tokens");
        }
    }
    if (group.kind == GroupKind::kRecurrent && group.checkpoint_pages < 1) {
        throw ConfigError("checkpoint_pages must be at least 1, but is " +
                          text(group.checkpoint_pages));
    }
}

const Config& checked(const Config& config) {
    const auto positive = [](const char* name, std::int32_t value) {
        if (value < 1)
            throw ConfigError(std::string(name) + " must be at least 1, but is " + text(value));
    };
    positive("page_size", config.page_size);
    positive("slots_max", config.slots_max);
    positive("step_tokens_max", config.step_tokens_max);
    positive("context_max", config.context_max);
    if (config.overlap_depth < 0) {
        throw ConfigError("overlap_depth must be at least 0, but is " + text(config.overlap_depth));
    }
    if (config.step_drafts_max < 0) {
        throw ConfigError("step_drafts_max must be at least 0, but is " +
                          text(config.step_drafts_max));
    }
    if (config.step_proposals_max < 0 || config.proposal_length_max < 0 ||
        (config.step_proposals_max > 0) != (config.proposal_length_max > 0)) {
        throw ConfigError(
            "step_proposals_max and proposal_length_max must both be 0, or both at "
            "least 1, but are " +
            text(config.step_proposals_max) + " and " + text(config.proposal_length_max));
    }
    if (config.proposal_window < 0) {
        throw ConfigError("proposal_window must be at least 0, but is " +
                          text(config.proposal_window));
    }
    if (config.step_tokens_max < config.slots_max) {
        throw ConfigError("step_tokens_max (" + text(config.step_tokens_max) +
                          ") must be at least slots_max (" + text(config.slots_max) + ")");
    }
    if (config.tps_floor && !(*config.tps_floor > 0)) {
        throw ConfigError("tps_floor must be above 0, but is " + std::to_string(*config.tps_floor));
    }
    if (config.queue_timeout_us && *config.queue_timeout_us < 1) {
        throw ConfigError("queue_timeout_us must be at least 1, but is " +
                          text(*config.queue_timeout_us));
    }
    if (config.groups.empty()) throw ConfigError("a model keeps at least one cache group");
    for (std::size_t i = 0; i < config.groups.size(); ++i) {
        check_group(config, config.groups[i]);
        for (std::size_t j = 0; j < i; ++j) {
            if (config.groups[i].kind == config.groups[j].kind) {
                throw ConfigError(std::string("there are two ") + name_of(config.groups[i].kind) +
                                  " cache groups; layers of one kind share one");
            }
        }
    }
    return config;
}

// The state of a recurrence cannot be rolled back behind a wrong guess.
bool allows_drafts(const Config& config) {
    return config.step_drafts_max > 0 &&
           std::ranges::find(config.groups, GroupKind::kRecurrent, &GroupConfig::kind) ==
               config.groups.end();
}

}  // namespace

Scheduler::Scheduler(const Config& config, std::unique_ptr<DraftSource> drafts)
    : page_size_(checked(config).page_size),
      context_max_(config.context_max),
      step_tokens_max_(config.step_tokens_max),
      slots_max_(config.slots_max),
      step_drafts_max_(config.step_drafts_max),
      step_proposals_max_(allows_drafts(config) ? config.step_proposals_max : 0),
      proposal_length_max_(allows_drafts(config) ? config.proposal_length_max : 0),
      drafts_(!allows_drafts(config) ? nullptr
              : drafts ? std::move(drafts)
                       : std::make_unique<Drafter>(config.draft_memory_size_bytes,
                                                   TokenCount(config.proposal_window))),
      store_(config.groups, page_size_, config.slots_max, context_max_, config.prefix_cache,
             config.cache_policy),
      ledger_(static_cast<std::size_t>(config.overlap_depth)),
      transfers_(config.slots_max),
      loading_(config.slots_max),
      receiving_(config.slots_max),
      prefilling_(config.slots_max),
      decoding_(config.slots_max),
      stepping_(config.slots_max),
      verifying_(config.slots_max),
      sending_(config.slots_max),
      doomed_(config.slots_max),
      cancelled_(config.slots_max),
      floor_(config.tps_floor),
      queue_timeout_us_(config.queue_timeout_us),
      lines_(static_cast<std::size_t>(config.slots_max), LineId(0)),
      served_(static_cast<std::size_t>(config.slots_max), false) {
    order_.reserve(static_cast<std::size_t>(config.slots_max));
    each_group([&]<class G>() { news_of<G>().kind = G::kKind; });
}

// Pages are linear to the end: what is held is given back, what flies or travels is taken to be
// over.
Scheduler::~Scheduler() {
    store_.index.record(false);
    for (const auto& arrival : arrivals_) {
        if (const auto* queued = std::get_if<Queued>(&arrival)) {
            forget(queued->request->id());
        }
    }
    std::vector<Aborted> live;
    for (const auto& [id, place] : places_) live.push_back({RequestId(id), place.order});
    for (const Aborted& aborted : live) apply(aborted);
    while (!flights_.empty()) {
        const Retired done = ledger_.retire();
        Flight& flight = flights_.front();
        each_group([&]<class G>() {
            for (auto& stored : flight.stores.of<G>())
                store_.index.stow<G>(std::move(stored), done);
        });
        for (const Row& row : flight.rows) {
            if (doomed_.at(row.slot)) land_doomed(row.slot, done);
        }
        flights_.pop_front();
    }
    for (std::int32_t slot = 0; transfers_.under_way() > 0; ++slot) {
        if (cancelled_.at(SlotId(slot))) {
            static_cast<void>(
                arrive(cancelled_.take(SlotId(slot)), transfers_.arrive(SlotId(slot)), store_));
        } else if (sending_.at(SlotId(slot))) {
            static_cast<void>(
                arrive(sending_.take(SlotId(slot)), transfers_.arrive(SlotId(slot)), store_));
        }
    }
}

// --- endings ------------------------------------------------------------------------------------

void Scheduler::reserve_endings(std::size_t more) {
    make_room_for(outcome_.finished, more);
    make_room_for(outcome_.reasons, more);
    make_room_for(outcome_.retries_ms, more);
    make_room_for(outcome_.draft_reports, 2 * more);
}

void Scheduler::report_end(RequestId request, FinishReason reason, std::int32_t retry_ms) noexcept {
    outcome_.finished.push_back(request.value);
    outcome_.reasons.push_back(static_cast<std::int32_t>(reason));
    outcome_.retries_ms.push_back(retry_ms);
    const Place& place = places_.find(request.value)->second;
    outcome_.draft_reports.push_back(place.drafted.value);
    outcome_.draft_reports.push_back(place.accepted.value);
    if (drafts_) drafts_->ended(request);
    // A plan that failed may have given it a slot: nobody is told of that any more.
    for (std::size_t i = bound_requests_.size(); i-- > 0;) {
        if (bound_requests_[i] != request.value) continue;
        bound_requests_.erase(bound_requests_.begin() + static_cast<std::ptrdiff_t>(i));
        bound_slots_.erase(bound_slots_.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

void Scheduler::conclude(const Finished& finished) noexcept {
    report_end(finished.id, finished.reason);
    forget(finished.id);
}

// Reported now; its id and its pages come back when its last step retires.
void Scheduler::conclude(Doomed&& doomed) noexcept {
    report_end(doomed.id, doomed.reason);
    doomed_.put(std::move(doomed));
}

// Reported now; its id and its pages come back when its transfer is over.
void Scheduler::conclude(Cancelled&& cancelled) noexcept {
    report_end(cancelled.id, cancelled.reason);
    cancelled_.put(std::move(cancelled));
}

// Its pages are back and its id is free again.
void Scheduler::forget(RequestId request) noexcept {
    const auto found = places_.find(request.value);
    if (const auto branch = found->second.branch) {
        store_.index.sessions().end(*branch, found->second.outputs.value, now_us_);
    }
    turns_.part(found->second.line);
    places_.erase(found);
}

void Scheduler::leave_order(SlotId slot) noexcept {
    order_.erase(std::ranges::find(order_, slot));
}

// --- views --------------------------------------------------------------------------------------

Outcome Scheduler::take_outcome() {
    return std::exchange(outcome_, {});
}

const Request* Scheduler::find(const Place& place) const noexcept {
    const auto in = [](const auto* state) { return state ? &*state->request : nullptr; };
    if (place.slot) {
        const SlotId slot = *place.slot;
        if (const auto* found = in(loading_.at(slot))) return found;
        if (const auto* found = in(receiving_.at(slot))) return found;
        if (const auto* found = in(prefilling_.at(slot))) return found;
        if (const auto* found = in(decoding_.at(slot))) return found;
        if (const auto* found = in(verifying_.at(slot))) return found;
        return in(stepping_.at(slot));
    }
    if (const auto* found = in(queued_.at(place.order))) return found;
    if (const auto* found = in(parked_.at(place.order))) return found;
    for (const auto& arrival : arrivals_) {
        const auto* submitted = std::get_if<Queued>(&arrival);
        if (submitted != nullptr && submitted->request->order() == place.order) {
            return &*submitted->request;
        }
    }
    return nullptr;
}

std::vector<std::int32_t> Scheduler::tokens(RequestId request) const {
    const auto found = places_.find(request.value);
    const Request* live = found == places_.end() ? nullptr : find(found->second);
    if (live == nullptr) {
        throw InvalidParameter("request " + text(request.value) + " is not live");
    }
    return live->tokens();
}

Stats Scheduler::stats() const {
    std::int64_t uncached = 0, submitted = 0;
    const auto count = [&](const Queued& queued) {
        uncached += uncached_of(*queued.request).value;
    };
    queued_.each(count);
    for (const auto& arrival : arrivals_) {
        if (const auto* queued = std::get_if<Queued>(&arrival)) {
            count(*queued);
            ++submitted;
        }
    }
    Stats stats{};
    each_group([&]<class G>() {
        const auto& device = store_.index.tier<G, Device>();
        const auto& host = store_.index.tier<G, Host>();
        stats.pages_total += device.pool().total().value;
        stats.pages_free += device.free_count().value;
        stats.pages_cached += device.cached_count().value;
        stats.host_pages_total += host.pool().total().value;
        stats.host_pages_cached += host.cached_count().value + host.referenced_count().value;
    });
    stats.pages_active = stats.pages_total - stats.pages_free - stats.pages_cached;
    stats.running = static_cast<std::int64_t>(order_.size());
    stats.waiting = static_cast<std::int64_t>(queued_.count()) + submitted;
    stats.parked = static_cast<std::int64_t>(parked_.count());
    stats.transferring = static_cast<std::int64_t>(transfers_.under_way());
    stats.waiting_uncached_tokens = uncached;
    stats.steps = steps_;
    stats.prompt_tokens = prompt_tokens_;
    stats.cached_tokens = cached_tokens_;
    stats.missed_evicted_tokens = missed_evicted_tokens_;
    stats.missed_unseen_tokens = missed_unseen_tokens_;
    stats.missed_other_salt_tokens = missed_other_salt_tokens_;
    stats.missed_tail_tokens = missed_tail_tokens_;
    stats.output_tokens = output_tokens_;
    stats.drafted_tokens = drafted_tokens_;
    stats.accepted_tokens = accepted_tokens_;
    stats.proposed_tokens = proposed_tokens_;
    if (drafts_) stats.draft_memory_size_bytes = static_cast<std::int64_t>(drafts_->size_bytes());
    stats.retractions = retractions_;
    stats.parkings = parkings_;
    stats.evictions = store_.index.evictions();
    stats.stores = store_.index.stores();
    stats.loads = loads_;
    stats.refusals = refusals_;
    return stats;
}

bool Scheduler::flush_cache() {
    store_.index.clear();
    return places_.empty();
}

}  // namespace tokenspeed::control
