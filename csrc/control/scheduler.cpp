#include "scheduler.h"

#include <algorithm>
#include <limits>
#include <string>

#include "events.h"

namespace tokenspeed::control {

namespace {

// One lambda for each alternative of a variant; a missing one does not compile.
template <class... F>
struct Overloaded : F... {
    using F::operator()...;
};

// Grows by doubling, so that making room again and again stays O(1) each.
template <class T>
void reserve_more(std::vector<T>& items, std::size_t more) {
    const std::size_t wanted = items.size() + more;
    if (wanted > items.capacity()) items.reserve(std::max(wanted, 2 * items.capacity()));
}

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
    reserve_more(outcome_.finished, more);
    reserve_more(outcome_.reasons, more);
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

// --- planning -----------------------------------------------------------------------------------

std::optional<Plan> Scheduler::plan() {
    apply_events();
    if (ledger_.full()) return std::nullopt;
    rows_.clear();
    budget_ = step_tokens_max_;
    starved_ = false;
    resting_.reset();
    draft_decodes();
    decode_count_ = static_cast<std::int32_t>(rows_.size());
    draft_prefills();
    draft_admissions();
    if (rows_.empty()) return std::nullopt;
    return launch_drafts();
}

const Request& Scheduler::running(SlotId slot) const noexcept {
    if (const auto* request = decoding_.at(slot)) return *request->request;
    if (const auto* request = stepping_.at(slot)) return *request->request;
    return *prefilling_.at(slot)->request;
}

void Scheduler::draft(SlotId slot, TokenCount start, TokenCount count, bool samples) {
    rows_.push_back({slot, start, count, samples});
    budget_ -= count.value;
}

bool Scheduler::decodes_next(const Stepping& request) const noexcept {
    return request.fed >= request.request->known() &&
           !request.request->exhausted(request.pending, context_max_);
}

void Scheduler::draft_decodes() {
    for (std::size_t rank = 0; rank < order_.size();) {
        const SlotId slot = order_[rank];
        const Decoding* rests = decoding_.at(slot);
        const Stepping* flies = stepping_.at(slot);
        const bool decodes = rests != nullptr || (flies != nullptr && decodes_next(*flies));
        if (!decodes || resting_ == slot) {
            ++rank;
            continue;
        }
        const TokenCount start =
            rests != nullptr ? rests->request->known() - TokenCount(1) : flies->fed;
        const bool needs = rests != nullptr ? needs_page(*rests) : needs_page(*flies);
        const Room room = needs ? make_room(rank) : Room::kReady;
        if (room == Room::kReady) draft(slot, start, TokenCount(1), true);
        if (room != Room::kGone) ++rank;
    }
}

// Finds the page that the request's next token needs. When the cache has nothing left to evict,
// the request that comes last in order gives way. In flight it cannot: then it is left out of this
// plan, and gives way once its step retired.
Scheduler::Room Scheduler::make_room(std::size_t rank) {
    const SlotId slot = order_[rank];
    for (;;) {
        if (auto page = store_.take()) {
            if (Decoding* rests = decoding_.at(slot)) {
                grow(*rests, std::move(*page));
            } else {
                grow(*stepping_.at(slot), std::move(*page));
            }
            return Room::kReady;
        }
        starved_ = true;
        // Pages are on their way back already.
        if (resting_ || doomed_count_ > 0) return Room::kWait;
        if (order_.size() == 1) {
            if (stepping_.at(slot)) return Room::kWait;
            // Alone it fills the pool: it ends here, and leaves the step to those who wait.
            starved_ = false;
            reserve_endings(1);
            leave_order(slot);
            conclude(finish(decoding_.take(slot), FinishReason::kLength, store_));
            return Room::kGone;
        }
        std::size_t victim = order_.size() - 1;
        while (victim > rank && !may_be_retracted(running(order_[victim]))) --victim;
        // All behind it are about to make progress, after which one of them gives way.
        if (victim == rank && rank + 1 < order_.size()) return Room::kWait;
        if (stepping_.at(order_[victim])) {
            resting_ = order_[victim];
            return Room::kWait;
        }
        retract_from(order_[victim]);
        if (victim == rank) return Room::kGone;
    }
}

void Scheduler::retract_from(SlotId slot) {
    const Request& request = running(slot);
    auto& room = queued_[request.order()];
    places_.at(request.id().value).slot.reset();
    leave_order(slot);
    if (decoding_.at(slot)) {
        room.emplace(retract(decoding_.take(slot), store_));
    } else {
        room.emplace(retract(prefilling_.take(slot), store_));
    }
    ++retractions_;
}

void Scheduler::draft_prefills() {
    for (const SlotId slot : order_) {
        if (budget_ == 0) return;
        if (resting_ == slot) continue;
        const Prefilling* rests = prefilling_.at(slot);
        const Stepping* flies = stepping_.at(slot);
        if (rests == nullptr && flies == nullptr) continue;
        const TokenCount fed = rests != nullptr ? rests->fed : flies->fed;
        const TokenCount known = running(slot).known();
        if (fed >= known) continue;
        const TokenCount chunk = std::min(known - fed, TokenCount(budget_));
        draft(slot, fed, chunk, fed + chunk == known);
    }
}

void Scheduler::draft_admissions() {
    while (budget_ > 0 && !starved_ && !store_.slots.empty() && !queued_.empty()) {
        const auto head = queued_.begin();
        if (!head->second) {
            queued_.erase(head);
            continue;
        }
        const Request& request = *head->second->request;
        const PageCount reserve = admission_reserve(order_.size(), request);
        if (blocked_ && blocked_->order == head->first &&
            blocked_->wanted + reserve > store_.available()) {
            return;
        }
        rows_.reserve(rows_.size() + 1);
        reserve_more(bound_slots_, 1);
        reserve_more(bound_requests_, 1);
        table_.reserve(request.tokens().size() / static_cast<std::size_t>(page_size_.value));

        auto probed = Admission::probe(*head->second, reserve, store_);
        if (const auto* refused = std::get_if<Admission::Refused>(&probed)) {
            blocked_ = {head->first, refused->wanted};
            return;
        }
        seat(std::move(*head->second), std::move(*std::get_if<Admission>(&probed)));
        queued_.erase(head);
    }
}

// Takes an admitted request to a slot and drafts its first chunk.
void Scheduler::seat(Queued&& queued, Admission&& ticket) noexcept {
    const bool first = !queued.request->was_admitted();
    const Prefilling& request =
        prefilling_.put(admit(std::move(queued), std::move(ticket), *store_.slots.take()));
    const SlotId slot = request.slot.id();
    const RequestId id = request.request->id();
    const TokenCount known = request.request->known();
    if (first) {
        prompt_tokens_ += known.value;
        cached_tokens_ += request.request->cached().value;
    }
    places_.find(id.value)->second.slot = slot;
    const auto behind = std::ranges::find_if(
        order_, [&](SlotId other) { return running(other).order() > request.request->order(); });
    order_.insert(behind, slot);
    bound_slots_.push_back(slot.value);
    bound_requests_.push_back(id.value);
    for (std::size_t i = 0; i < request.sealed.size(); ++i) {
        table_.add(slot, i, request.sealed[i].id());
    }
    const TokenCount chunk = std::min(known - request.fed, TokenCount(budget_));
    draft(slot, request.fed, chunk, request.fed + chunk == known);
}

// --- launching ----------------------------------------------------------------------------------

// Everything is allocated before the first request moves.
Plan Scheduler::launch_drafts() {
    std::size_t tokens = 0, samples = 0, opened = 0;
    std::vector<Berth> berths;
    berths.reserve(rows_.size());
    for (const Row& row : rows_) {
        const std::size_t pages =
            static_cast<std::size_t>(pages_for(row.count, page_size_).value) + 1;
        const Stepping* flies = stepping_.at(row.slot);
        berths.emplace_back(pages + (flies != nullptr ? flies->lent.size() : 0));
        tokens += static_cast<std::size_t>(row.count.value);
        samples += row.samples ? 1 : 0;
        opened += pages;
    }
    table_.reserve(opened);

    Plan plan{.step = StepId(0),
              .decode_count = decode_count_,
              .row_slots = {},
              .query_starts = {},
              .context_lens = {},
              .token_ids = {},
              .sample_rows = {},
              .sample_positions = {},
              .bound_slots = {},
              .bound_requests = {},
              .kv_slots = {},
              .table = {}};
    plan.row_slots.reserve(rows_.size());
    plan.query_starts.reserve(rows_.size() + 1);
    plan.context_lens.reserve(rows_.size());
    plan.token_ids.reserve(tokens);
    plan.kv_slots.reserve(tokens);
    plan.sample_rows.reserve(samples);
    plan.sample_positions.reserve(samples);
    flights_.push_back({StepId(0), rows_, samples});

    plan.step = flights_.back().step = ledger_.launch();
    plan.query_starts.push_back(0);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
        launch_row(rows_[i], static_cast<std::int32_t>(i), std::move(berths[i]), plan);
    }
    plan.bound_slots = std::exchange(bound_slots_, {});
    plan.bound_requests = std::exchange(bound_requests_, {});
    plan.table = std::exchange(table_, {});
    ++steps_;
    return plan;
}

void Scheduler::launch_row(const Row& row, std::int32_t index, Berth&& berth, Plan& plan) noexcept {
    // Which output token the row samples: those known and those in flight come before it.
    const TokenCount before =
        stepping_.at(row.slot) ? stepping_.at(row.slot)->pending : TokenCount(0);
    const bool decodes = index < plan.decode_count;
    Stepping& flying = stepping_.put(
        decoding_.at(row.slot) ? launch(decoding_.take(row.slot), plan.step, std::move(berth))
        : prefilling_.at(row.slot)
            ? launch(prefilling_.take(row.slot), plan.step, row.count, std::move(berth))
            : extend(stepping_.take(row.slot), plan.step, row.count, std::move(berth)));
    const Request& request = *flying.request;

    plan.row_slots.push_back(row.slot.value);
    plan.context_lens.push_back(row.start.value);
    if (row.samples) {
        plan.sample_rows.push_back(index);
        plan.sample_positions.push_back((request.outputs() + before).value);
    }
    for (TokenCount at = row.start; at < row.start + row.count; at += TokenCount(1)) {
        const std::size_t page = static_cast<std::size_t>(at.value / page_size_.value);
        const TokenCount offset(at.value % page_size_.value);
        const InFlight<OpenPage>& lease = flying.lent[page - flying.sealed.size()];
        if (offset == TokenCount(0)) table_.add(row.slot, page, lease.id());
        plan.kv_slots.push_back(kv_slot(lease, offset, page_size_));
        plan.token_ids.push_back(decodes ? 0
                                         : request.tokens()[static_cast<std::size_t>(at.value)]);
    }
    plan.query_starts.push_back(static_cast<std::int32_t>(plan.token_ids.size()));
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
    reserve_more(outcome_.requests, flight.samples);
    reserve_more(outcome_.tokens, flight.samples);
    reserve_more(outcome_.sample_indices, flight.samples);
    reserve_more(outcome_.cached_counts, flight.samples);
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
