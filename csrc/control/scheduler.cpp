#include "scheduler.h"

#include <algorithm>
#include <limits>
#include <string>

#include "events.h"
#include "room.h"

namespace tokenspeed::control {

namespace {

// One lambda for each alternative of a variant; a missing one does not compile.
template <class... F>
struct Overloaded : F... {
    using F::operator()...;
};

std::string text(std::int64_t number) {
    return std::to_string(number);
}

const Config& checked(const Config& config) {
    const auto positive = [](const char* name, std::int32_t value) {
        if (value < 1)
            throw ConfigError(std::string(name) + " must be at least 1, but is " + text(value));
    };
    positive("pages", config.pages);
    positive("page_size", config.page_size);
    positive("slots_max", config.slots_max);
    positive("step_tokens_max", config.step_tokens_max);
    positive("context_max", config.context_max);
    if (config.overlap_depth < 0) {
        throw ConfigError("overlap_depth must be at least 0, but is " + text(config.overlap_depth));
    }
    if (config.step_tokens_max < config.slots_max) {
        throw ConfigError("step_tokens_max (" + text(config.step_tokens_max) +
                          ") must be at least slots_max (" + text(config.slots_max) + ")");
    }
    if (static_cast<std::int64_t>(config.pages) * config.page_size >
        std::numeric_limits<std::int32_t>::max()) {
        throw ConfigError("pages * page_size must be below 2^31, but is " + text(config.pages) +
                          " * " + text(config.page_size) + "; lower --kv-cache-size-bytes");
    }
    return config;
}

}  // namespace

Scheduler::Scheduler(const Config& config)
    : page_size_(checked(config).page_size),
      context_max_(config.context_max),
      step_tokens_max_(config.step_tokens_max),
      slots_max_(config.slots_max),
      store_(PageCount(config.pages), page_size_, config.slots_max, config.prefix_cache),
      ledger_(static_cast<std::size_t>(config.overlap_depth)),
      prefilling_(config.slots_max),
      decoding_(config.slots_max),
      stepping_(config.slots_max),
      doomed_(config.slots_max) {
    order_.reserve(static_cast<std::size_t>(config.slots_max));
}

// Pages are linear to the end: what is held is given back, what flies is taken to have retired.
Scheduler::~Scheduler() {
    store_.index.record(false);
    while (!order_.empty()) apply(running(order_.back()).id());
    while (!flights_.empty()) {
        const Retired done = ledger_.retire();
        for (const Row& row : flights_.front().rows) land_doomed(row.slot, done);
        flights_.pop_front();
    }
}

// --- events -------------------------------------------------------------------------------------

void Scheduler::submit(Submission&& wish) {
    if (places_.contains(wish.id.value)) {
        throw InvalidParameter("the request id " + text(wish.id.value) + " is in use");
    }
    if (wish.prompt.empty()) throw InvalidParameter("the prompt must hold at least one token");
    if (wish.max_new_tokens < 1) {
        throw InvalidParameter("max_new_tokens must be at least 1, but is " +
                               text(wish.max_new_tokens));
    }
    if (wish.min_new_tokens < 0) {
        throw InvalidParameter("min_new_tokens must be at least 0, but is " +
                               text(wish.min_new_tokens));
    }
    if (const auto bad = std::ranges::find_if(wish.prompt, [](auto token) { return token < 0; });
        bad != wish.prompt.end()) {
        throw InvalidParameter("token ids must be at least 0, but position " +
                               text(bad - wish.prompt.begin()) + " of the prompt holds " +
                               text(*bad));
    }
    if (wish.prompt.size() >= static_cast<std::size_t>(context_max_.value)) {
        throw ContextOverflow("the prompt holds " +
                              text(static_cast<std::int64_t>(wish.prompt.size())) +
                              " tokens, which leaves no room to generate in a context of " +
                              text(context_max_.value) + "; shorten it or raise --max-context");
    }
    const std::int64_t id = wish.id.value;
    const Order order{wish.priority, arrivals_seen_};
    Queued queued(RequestBox(std::move(wish), order, page_size_));
    const auto place = places_.emplace(id, Place{order, std::nullopt}).first;
    try {
        arrivals_.emplace_back(std::move(queued));
    } catch (...) {
        places_.erase(place);
        throw;
    }
    ++arrivals_seen_;
}

void Scheduler::abort(RequestId request) {
    if (places_.contains(request.value)) arrivals_.emplace_back(request);
}

void Scheduler::apply_events() {
    for (; !arrivals_.empty(); arrivals_.pop_front()) {
        std::visit([&](auto&& event) { apply(std::move(event)); }, std::move(arrivals_.front()));
    }
}

void Scheduler::apply(Queued&& submitted) {
    if (fits(*submitted.request, store_.pages.total())) {
        auto& place = queued_[submitted.request->order()];
        place.emplace(std::move(submitted));
    } else {
        reserve_endings(1);
        conclude(finish(std::move(submitted), FinishReason::kRejected));
    }
}

void Scheduler::apply(RequestId aborted) {
    const auto found = places_.find(aborted.value);
    if (found == places_.end()) return;  // It finished after the abort was sent.
    reserve_endings(1);
    const auto seated = [&](auto&& request) {
        leave_order(request.slot.id());
        conclude(on(Abort{}, std::move(request), store_));
    };
    std::visit(
        Overloaded{[&](Queued&& request) { conclude(on(Abort{}, std::move(request), store_)); },
                   [&](Prefilling&& request) { seated(std::move(request)); },
                   [&](Decoding&& request) { seated(std::move(request)); },
                   [&](Stepping&& request) { seated(std::move(request)); },
                   [&](Doomed&& request) { doomed_.put(on(Abort{}, std::move(request), store_)); }},
        extract(found->second));
}

Scheduler::Live Scheduler::extract(const Place& place) {
    if (!place.slot) return std::move(*queued_.extract(place.order).mapped());
    if (prefilling_.at(*place.slot)) return prefilling_.take(*place.slot);
    if (decoding_.at(*place.slot)) return decoding_.take(*place.slot);
    if (stepping_.at(*place.slot)) return stepping_.take(*place.slot);
    return doomed_.take(*place.slot);
}

// --- endings ------------------------------------------------------------------------------------

void Scheduler::reserve_endings(std::size_t more) {
    make_room_for(outcome_.finished, more);
    make_room_for(outcome_.reasons, more);
}

void Scheduler::conclude(const Finished& finished) noexcept {
    outcome_.finished.push_back(finished.id.value);
    outcome_.reasons.push_back(static_cast<std::int32_t>(finished.reason));
    places_.erase(finished.id.value);
}

// Reported now; its id and its pages come back when its last step retires.
void Scheduler::conclude(Doomed&& doomed) noexcept {
    outcome_.finished.push_back(doomed.id.value);
    outcome_.reasons.push_back(static_cast<std::int32_t>(doomed.reason));
    doomed_.put(std::move(doomed));
    ++doomed_count_;
}

void Scheduler::leave_order(SlotId slot) noexcept {
    order_.erase(std::ranges::find(order_, slot));
}

// --- committing ---------------------------------------------------------------------------------

void Scheduler::commit(StepId step, std::span<const std::int32_t> tokens) {
    if (flights_.empty()) {
        throw EngineError("no step is in flight, but step " + text(step.value) + " was committed");
    }
    const Flight& flight = flights_.front();
    if (flight.step != step) {
        throw EngineError("steps are committed in order: wanted step " + text(flight.step.value) +
                          ", but got " + text(step.value));
    }
    if (tokens.size() != flight.samples) {
        throw EngineError("step " + text(step.value) + " samples " +
                          text(static_cast<std::int64_t>(flight.samples)) + " tokens, but got " +
                          text(static_cast<std::int64_t>(tokens.size())));
    }
    if (std::ranges::any_of(tokens, [](std::int32_t token) { return token < 0; })) {
        throw EngineError("step " + text(step.value) + " returned a negative token id");
    }
    reserve_commit(flight);

    const Retired done = ledger_.retire();
    std::int32_t sample = 0;
    for (const Row& row : flight.rows) {
        std::optional<std::int32_t> token;
        if (row.samples) token = tokens[static_cast<std::size_t>(sample)];
        if (doomed_.at(row.slot)) {
            land_doomed(row.slot, done);
        } else {
            land_row(row, done, token, sample);
        }
        if (row.samples) ++sample;
    }
    flights_.pop_front();
}

void Scheduler::reserve_commit(const Flight& flight) {
    reserve_endings(flight.samples);
    make_room_for(outcome_.requests, flight.samples);
    make_room_for(outcome_.tokens, flight.samples);
    make_room_for(outcome_.sample_indices, flight.samples);
    make_room_for(outcome_.cached_counts, flight.samples);
    std::size_t swaps = 0;
    for (const Row& row : flight.rows) {
        if (Stepping* flying = stepping_.at(row.slot)) {
            reserve_landing(*flying, swaps_);
            flying->request->reserve_token();
            swaps += flying->lent.size();
        }
    }
    table_.reserve(swaps);
}

void Scheduler::land_row(const Row& row, const Retired& done, std::optional<std::int32_t> token,
                         std::int32_t sample) {
    Stepping flying = stepping_.take(row.slot);
    std::optional<FinishReason> end;
    if (token) {
        flying.request->append(*token);
        flying.pending -= TokenCount(1);
        outcome_.requests.push_back(flying.request->id().value);
        outcome_.tokens.push_back(*token);
        outcome_.sample_indices.push_back(sample);
        outcome_.cached_counts.push_back(flying.request->cached().value);
        ++output_tokens_;
        end = flying.request->end(context_max_);
    }
    Landed landed = land(std::move(flying), done, row.start + row.count, store_, swaps_);
    for (const Swap& swap : swaps_) {
        table_.add(row.slot, static_cast<std::size_t>(swap.index), swap.page);
    }
    swaps_.clear();

    if (end) leave_order(row.slot);
    std::visit(Overloaded{[&](Prefilling&& request) { prefilling_.put(std::move(request)); },
                          [&](Decoding&& request) {
                              if (end) {
                                  conclude(finish(std::move(request), *end, store_));
                              } else {
                                  decoding_.put(std::move(request));
                              }
                          },
                          [&](Stepping&& request) {
                              if (end) {
                                  conclude(doom(std::move(request), *end, store_));
                              } else {
                                  stepping_.put(std::move(request));
                              }
                          }},
               std::move(landed));
}

void Scheduler::land_doomed(SlotId slot, const Retired& done) noexcept {
    std::visit(Overloaded{[&](Doomed&& request) { doomed_.put(std::move(request)); },
                          [&](const Finished& request) {
                              places_.erase(request.id.value);
                              --doomed_count_;
                          }},
               land(doomed_.take(slot), done, store_));
}

// --- views --------------------------------------------------------------------------------------

Outcome Scheduler::take_outcome() {
    return std::exchange(outcome_, {});
}

std::vector<std::int32_t> Scheduler::tokens(RequestId request) const {
    const auto found = places_.find(request.value);
    if (found != places_.end()) {
        const Place& place = found->second;
        if (place.slot && !doomed_.at(*place.slot)) return running(*place.slot).tokens();
        if (const auto queued = queued_.find(place.order); queued != queued_.end()) {
            return queued->second->request->tokens();
        }
        for (const auto& arrival : arrivals_) {
            const auto* submitted = std::get_if<Queued>(&arrival);
            if (submitted != nullptr && submitted->request->id() == request) {
                return submitted->request->tokens();
            }
        }
    }
    throw InvalidParameter("request " + text(request.value) + " is not live");
}

Stats Scheduler::stats() const {
    std::int64_t waiting = 0, uncached = 0;
    const auto count = [&](const Queued& queued) {
        const Request& request = *queued.request;
        const auto reusable =
            (request.tokens().size() - 1) / static_cast<std::size_t>(page_size_.value);
        const PageCount cached = store_.index.peek(std::span(request.hashes()).first(reusable));
        ++waiting;
        uncached += request.known().value - cached.value * page_size_.value;
    };
    for (const auto& [order, queued] : queued_) {
        if (queued) count(*queued);
    }
    for (const auto& arrival : arrivals_) {
        if (const auto* queued = std::get_if<Queued>(&arrival)) count(*queued);
    }
    const std::int64_t total = store_.pages.total().value;
    const std::int64_t free = store_.pages.free_count().value;
    const std::int64_t cached = store_.index.cached_count().value;
    return {.running = static_cast<std::int64_t>(order_.size()),
            .waiting = waiting,
            .waiting_uncached_tokens = uncached,
            .pages_total = total,
            .pages_free = free,
            .pages_cached = cached,
            .pages_active = total - free - cached,
            .steps = steps_,
            .prompt_tokens = prompt_tokens_,
            .cached_tokens = cached_tokens_,
            .output_tokens = output_tokens_,
            .retractions = retractions_,
            .evictions = store_.index.evictions()};
}

bool Scheduler::flush_cache() {
    store_.index.clear();
    return places_.empty();
}

}  // namespace tokenspeed::control
