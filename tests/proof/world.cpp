#include "world.h"

#include <algorithm>
#include <new>
#include <optional>
#include <utility>

#include "wrong.h"

namespace tokenspeed::proof {

using control::FinishReason;

void rehearse(Script& script, std::int32_t vocabulary, std::int32_t context_max) {
    script.history = script.prompt;
    script.states = {0};
    for (const std::int32_t token : script.prompt) {
        script.states.push_back(follow(script.states.back(), token));
    }
    script.reason = FinishReason::kLength;
    const bool sends = script.handover == control::Handover::kSend;
    const std::int64_t outputs_max = sends ? 1 : script.max_new_tokens;
    for (std::int64_t outputs = 1;; ++outputs) {
        const auto token = static_cast<std::int32_t>(script.states.back() %
                                                     static_cast<std::uint64_t>(vocabulary));
        script.states.push_back(follow(script.states.back(), token));
        script.history.push_back(token);
        if (outputs > script.min_new_tokens &&
            std::ranges::find(script.stop_token_ids, token) != script.stop_token_ids.end()) {
            script.reason = FinishReason::kStop;
            return;
        }
        if (outputs == outputs_max ||
            script.history.size() == static_cast<std::size_t>(context_max)) {
            return;
        }
    }
}

World::World(const control::Config& config, Checks checks)
    : World(config, checks,
            std::make_unique<Adversary>([this](std::int64_t request) { return of(request); })) {}

World::World(const control::Config& config, Checks checks, std::unique_ptr<Adversary> adversary)
    : config_(config),
      checks_(checks),
      adversary_(config.step_drafts_max > 0 && !checks.own_drafts ? adversary.get() : nullptr),
      scheduler_(config, checks.own_drafts ? nullptr : std::move(adversary)),
      device_(config, *this) {
    // A machine that is known, where a guess costs next to nothing.
    for (std::int64_t rows = 1; checks.own_drafts && rows <= 8; ++rows) {
        scheduler_.observe({.decode_rows = rows}, 10'000 + rows);
    }
    for (const control::GroupConfig& group : config.groups) {
        if (group.kind != control::GroupKind::kFull && group.kind != control::GroupKind::kLatent) {
            continue;
        }
        const auto tokens =
            static_cast<std::size_t>(group.pages) * static_cast<std::size_t>(config.page_size);
        capacity_ = std::min(capacity_.value_or(tokens), tokens);
    }
}

// Calls the scheduler. Where memory runs out on the way, nothing may be lost, and the call must
// succeed when there is memory again; false if that is left to a later call.
template <class Call>
bool World::attempt(Call&& call, bool may_wait) {
    if (checks_.faults != nullptr) {
        checks_.faults->arm();
        try {
            call();
            checks_.faults->disarm();
            return true;
        } catch (const std::bad_alloc&) {
            checks_.faults->disarm();
            scheduler_.audit();
            if (may_wait && checks_.faults->waits()) return false;
        }
    }
    call();
    return true;
}

// --- what a client does -------------------------------------------------------------------------

void World::submit(std::int64_t request, const Script& script) {
    attempt([&] {
        scheduler_.submit({.id = control::RequestId(request),
                           .prompt = script.prompt,
                           .stop_token_ids = script.stop_token_ids,
                           .max_new_tokens = script.max_new_tokens,
                           .min_new_tokens = script.min_new_tokens,
                           .salt = script.salt,
                           .priority = script.priority,
                           .handover = script.handover,
                           .tenant = control::TenantId(script.salt)});
    });
    clients_.insert({request, Client{.script = &script, .arrival = submitted_++}});
    ++live_;
    after_event();
}

bool World::abort(std::int64_t request) {
    const auto found = clients_.find(request);
    const bool ended = found == clients_.end() || found->second.ended;
    // One that ended may fly or travel on; else there is nothing that an abort could change.
    const std::size_t before = ended ? scheduler_.fingerprint().words.size() : 0;
    attempt([&] { scheduler_.abort(control::RequestId(request)); });
    const bool known = !ended || scheduler_.fingerprint().words.size() > before;
    if (found != clients_.end()) found->second.aborted = found->second.aborted || known;
    after_event();
    return known;
}

bool World::live(std::int64_t request) const {
    const auto found = clients_.find(request);
    return found != clients_.end() && !found->second.ended;
}

bool World::aborted(std::int64_t request) const {
    return client(request).aborted;
}

std::size_t World::outputs(std::int64_t request) const {
    return client(request).outputs;
}

World::Client& World::client(std::int64_t request) {
    return const_cast<Client&>(std::as_const(*this).client(request));
}

const World::Client& World::client(std::int64_t request) const {
    const auto found = clients_.find(request);
    expect(found != clients_.end(),
           "client: the scheduler speaks of a request that was never made");
    return found->second;
}

History World::of(std::int64_t request) const {
    const Script& script = *client(request).script;
    return {script.salt, script.prompt.size(), script.history, script.states,
            script.reason == FinishReason::kLength};
}

// --- what the engine does -----------------------------------------------------------------------

bool World::launch(Adversary::Choose guesses, bool rests, std::size_t asks,
                   const Device::Foresee& foresee) {
    std::optional<control::Plan> plan;
    if (adversary_ != nullptr) adversary_->set(std::move(guesses), rests, asks);
    static_cast<void>(attempt([&] { plan = scheduler_.plan(now_us_ += checks_.step_us); }, true));
    collect(nullptr);
    if (plan) {
        for (const std::int64_t request : plan->bound_requests) {
            Client& bound = client(request);
            expect(!bound.ended, "client: a request takes a slot after its end");
            if (++bound.stays > 2 && bound.outputs == bound.outputs_at_stay && !bound.failed &&
                scheduler_.stats().parkings == 0) {
                wrong("client: request " + text(request) + " was retracted again without progress");
            }
            bound.outputs_at_stay = bound.outputs;
        }
        for (const std::int64_t request : plan->bound_requests) check_turn(request);
        flights_.push_back({plan->step, device_.launch(*plan), {}});
        flights_.back().proposals = device_.propose(*plan, foresee);
        expect(flights_.size() <= static_cast<std::size_t>(config_.overlap_depth) + 1,
               "client: more steps fly than may");
    }
    after_event();
    return plan.has_value();
}

void World::transferred(std::int64_t request, bool complete) {
    const Device::Transfer transfer = device_.transferred(request, complete);
    Client& of = client(request);
    of.sent = complete && transfer.kind == control::TransferKind::kSend;
    of.failed = of.failed || !complete;
    static_cast<void>(
        attempt([&] { scheduler_.transferred(control::TransferId(transfer.id), complete); }));
    after_event();
}

// Order is arrival order within a priority and a tenant: whoever came before is not left waiting.
void World::check_turn(std::int64_t request) const {
    const Client& bound = client(request);
    for (const auto& [other, waiting] : clients_) {
        if (waiting.arrival >= bound.arrival || waiting.stays > 0 || waiting.ended) continue;
        if (waiting.script->priority != bound.script->priority) continue;
        if (waiting.script->salt != bound.script->salt) continue;
        wrong("client: request " + text(request) + " overtakes request " + text(other));
    }
}

void World::commit() {
    const Flight flight = std::move(flights_.front());
    flights_.pop_front();
    device_.retire();
    const auto& [starts, tokens, chances] = flight.proposals;
    attempt([&, proposed = control::Proposed{starts, tokens, chances}] {
        scheduler_.commit(flight.step, flight.tokens, now_us_, proposed);
    });
    collect(&flight.tokens);
    after_event();
}

void World::flush() {
    if (scheduler_.flush_cache()) expect(live_ == 0, "client: a flush took what live requests use");
    after_event();
}

void World::collect(const std::vector<std::int32_t>* tokens) {
    const control::Outcome outcome = scheduler_.take_outcome();
    expect(outcome.tokens.size() == outcome.requests.size() &&
               outcome.sample_indices.size() == outcome.requests.size() &&
               outcome.cached_counts.size() == outcome.requests.size() &&
               outcome.reasons.size() == outcome.finished.size(),
           "client: the columns of an outcome disagree");
    for (std::size_t i = 0; i < outcome.requests.size(); ++i) {
        expect(tokens != nullptr, "client: tokens without a commit");
        Client& to = client(outcome.requests[i]);
        expect(!to.ended, "client: a token after the terminal event");
        const auto sample = static_cast<std::size_t>(outcome.sample_indices[i]);
        expect(sample < tokens->size() && (*tokens)[sample] == outcome.tokens[i],
               "client: a token that was not sampled");
        const std::size_t at = to.script->prompt.size() + to.outputs;
        expect(at < to.script->history.size() && to.script->history[at] == outcome.tokens[i],
               "client: a request gets another token than it gets alone");
        ++to.outputs;
        const std::int32_t cached = outcome.cached_counts[i];
        expect(cached >= 0 && static_cast<std::size_t>(cached) < to.script->prompt.size() &&
                   (to.cached == -1 || to.cached == cached || to.failed),
               "client: the count of cached tokens is wrong");
        to.cached = cached;
    }
    for (std::size_t i = 0; i < outcome.finished.size(); ++i) {
        Client& to = client(outcome.finished[i]);
        if (to.ended) wrong("client: request " + text(outcome.finished[i]) + " ends twice");
        to.ended = true;
        --live_;
        check_end(to, static_cast<FinishReason>(outcome.reasons[i]));
    }
}

void World::check_end(const Client& client, FinishReason reason) const {
    const Script& script = *client.script;
    const bool sends = script.handover == control::Handover::kSend;
    const std::size_t known = script.prompt.size() + client.outputs;
    if (reason == FinishReason::kAbort) {
        expect(client.aborted || (sends && client.failed),
               "client: a request ends as aborted that nobody aborted");
    } else if (reason == FinishReason::kRefused) {
        expect(config_.queue_timeout_us && client.stays == 0,
               "client: a request was refused that may wait, or ran already");
    } else if (reason == FinishReason::kRejected) {
        expect(capacity_ && script.prompt.size() + 1 > *capacity_,
               "client: a request was rejected that fits");
    } else if (known < script.history.size()) {
        expect(reason == FinishReason::kLength && capacity_ && known - 1 == *capacity_,
               "client: a request ends before its end");
    } else {
        expect(reason == script.reason, "client: a request ends for another reason than alone");
        expect(!sends || client.sent || reason == FinishReason::kStop,
               "client: a request ends before it was sent");
    }
}

void World::after_event() {
    if (!checks_events_) return;
    if (checks_.scribble) device_.scribble(scheduler_.fingerprint());
    if (++events_ % checks_.audit_every == 0) scheduler_.audit();
}

void World::check_events(bool on) {
    checks_events_ = on;
    if (on && checks_.scribble) device_.scribble(scheduler_.fingerprint());
}

void World::drain(std::int64_t turns_max) {
    for (std::int64_t turn = 0, idle = 0; turn < turns_max; ++turn) {
        while (any_travels()) transferred(device_.transfers().begin()->first, true);
        const bool launched = !full() && launch();
        const bool commits = in_flight() && (!launched || full());
        if (commits) commit();
        // A plan that sends somebody away may launch nothing; the next one does.
        idle = launched || commits || any_travels() ? 0 : idle + 1;
        if (idle == 3) return check_rest();
    }
    wrong("client: the scheduler does not come to rest in " + text(turns_max) + " turns");
}

void World::check_rest() {
    expect(live_ == 0, "client: nothing can run, but requests are live");
    scheduler_.audit();
    const control::Stats stats = scheduler_.stats();
    expect(stats.running == 0 && stats.waiting == 0 && stats.pages_active == 0 &&
               stats.parked == 0 && stats.transferring == 0,
           "client: nobody is left, but something is held");
}

World::Key World::key(bool aborts_scarce) const {
    control::Fingerprint fingerprint = scheduler_.fingerprint();
    device_.describe(fingerprint);
    auto& words = fingerprint.words;
    // Of the order of arrival only what is between those who live.
    std::vector<std::int64_t> arrivals;
    std::int64_t aborts = 0;
    for (const auto& [request, client] : clients_) {
        if (!client.ended) arrivals.push_back(client.arrival);
        aborts += client.aborted;
    }
    std::ranges::sort(arrivals);
    const bool flies = in_flight() || any_travels();
    for (const auto& [request, client] : clients_) {
        words.push_back(request);
        words.push_back(client.ended * 2 + (client.aborted && (flies || !client.ended)));
        if (client.ended) continue;
        words.push_back(std::ranges::lower_bound(arrivals, client.arrival) - arrivals.begin());
        words.push_back(static_cast<std::int64_t>(client.outputs));
        words.push_back(client.cached);
        words.push_back(client.stays > 1 ? 2 : client.stays);
        words.push_back(static_cast<std::int64_t>(client.outputs_at_stay));
        words.push_back(client.sent * 2 + client.failed);
    }
    for (const Flight& flight : flights_) fingerprint.add(flight.proposals.tokens);
    if (aborts_scarce) words.push_back(aborts);
    Key key{1, 2};
    for (const std::int64_t word : fingerprint.words) {
        const auto bits = static_cast<std::uint64_t>(word);
        key[0] = (key[0] ^ bits) * 0x9e3779b97f4a7c15;
        key[0] ^= key[0] >> 29;
        key[1] = (key[1] + bits) * 0xbf58476d1ce4e5b9;
        key[1] ^= key[1] >> 31;
    }
    return key;
}

}  // namespace tokenspeed::proof
