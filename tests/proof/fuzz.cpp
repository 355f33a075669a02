// Any bytes, read as calls with any values: each either works or throws an error of ours, and
// whatever was thrown, nothing is lost. For libFuzzer, and replayed by fuzz_replay.cpp.
//
// The values are those the binding takes: 64-bit ids and limits, columns of 32-bit tokens, a
// 64-bit salt. An input is a configuration, then calls until the bytes end.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "bytes.h"
#include "scheduler.h"

namespace tokenspeed::proof {

namespace {

// Ends the program where libFuzzer can see it.
void demand(bool holds, const char* otherwise) {
    if (holds) return;
    std::fprintf(stderr, "WRONG: %s\n", otherwise);
    std::abort();
}

// Mostly what is sensible, in one field of some inputs what nobody should ask for.
control::Config configuration(Bytes& bytes) {
    control::Config config{.groups = {},
                           .page_size = 1 + bytes.below(5),
                           .slots_max = 1 + bytes.below(5),
                           .step_tokens_max = 1 + bytes.below(24),
                           .context_max = 1 + bytes.below(64),
                           .overlap_depth = bytes.below(4),
                           .prefix_cache = bytes.below(4) > 0,
                           .cache_policy = static_cast<control::CachePolicy>(bytes.below(2)),
                           .tps_floor = std::nullopt,
                           .queue_timeout_us = std::nullopt,
                           .step_drafts_max = bytes.below(3) == 0 ? bytes.below(12) : 0};
    if (config.step_drafts_max > 4) {
        config.step_proposals_max = bytes.below(8);
        config.proposal_length_max = bytes.below(8);
    }
    if (bytes.below(3) == 0) config.tps_floor = static_cast<double>(bytes.number());
    if (bytes.below(3) == 0) config.queue_timeout_us = bytes.number();
    const std::int32_t kinds = bytes.below(8) > 4 ? bytes.below(16) : 1;
    for (std::int32_t kind = 0; kind < 4; ++kind) {
        if ((kinds >> kind & 1) == 0) continue;
        config.groups.push_back({.kind = static_cast<control::GroupKind>(kind),
                                 .pages = 1 + bytes.below(40),
                                 .host_pages = std::max(0, bytes.below(24) - 12),
                                 .window = kind == 1 ? 1 + bytes.below(12) : 0,
                                 .checkpoint_pages = kind == 3 ? 1 + bytes.below(3) : 0});
    }
    const std::int32_t bad = bytes.below(2) == 0 ? -bytes.below(2) : Int32::min();
    control::GroupConfig* const group = config.groups.empty() ? nullptr : &config.groups.back();
    switch (bytes.below(48)) {
        case 0:
            if (group != nullptr) group->pages = bad;
            break;
        case 1:
            config.page_size = bad;
            break;
        case 2:
            config.slots_max = bad;
            break;
        case 3:
            config.step_tokens_max = bad;
            break;
        case 4:
            config.context_max = bad;
            break;
        case 5:
            config.overlap_depth = Int32::min();
            break;
        case 6:
            if (group != nullptr) group->pages = config.page_size = 1 << 16;
            break;
        case 7:
            config.step_tokens_max = Int32::max();
            break;
        case 8:
            if (group != nullptr) group->host_pages = Int32::min();
            break;
        case 9:
            if (group != nullptr) group->window = bad;
            break;
        case 10:
            if (group != nullptr) group->checkpoint_pages = bad;
            break;
        case 11:
            if (group != nullptr) config.groups.push_back(*group);
            break;
        default:
            break;
    }
    return config;
}

// Any drafts, too long ones too.
class AnyDrafts final : public control::DraftSource {
  public:
    explicit AnyDrafts(Bytes& bytes) : bytes_(bytes) {}
    void follow(std::span<const control::Request* const>) override {}
    void draft(std::span<Row> rows, const Step&, const control::StepTimeModel&) override {
        for (Row& row : rows) {
            if (bytes_.below(2) == 0) {
                row.draft = row.proposal->tokens;
                continue;
            }
            row.draft = bytes_.tokens(6);
            // No source guesses what cannot be.
            for (std::int32_t& token : row.draft) token = std::max(token, 0);
        }
    }
    void propose(std::span<Ask> rows, const Step&, const control::StepTimeModel&) override {
        for (Ask& ask : rows) ask.count = control::TokenCount(bytes_.below(6));
    }
    bool wants_rest(const control::Request&) override { return bytes_.below(4) == 1; }
    void ended(control::RequestId) noexcept override {}

  private:
    Bytes& bytes_;
};

class Caller {
  public:
    Caller(const control::Config& config, Bytes& bytes)
        : scheduler_(config, bytes.below(2) == 0 ? std::make_unique<AnyDrafts>(bytes) : nullptr),
          bytes_(bytes) {
        // A machine that is known, so that the control plane's own drafts come at once.
        for (std::int64_t rows = 1; rows <= 8; ++rows) {
            scheduler_.observe({.decode_rows = rows}, 10'000 + rows);
        }
    }

    void run() {
        while (!bytes_.empty()) {
            try {
                call();
            } catch (const control::InvalidParameter&) {
            } catch (const control::ContextOverflow&) {
            } catch (const control::EngineError&) {
            }
            collect();
            scheduler_.audit();
        }
        drain();
    }

  private:
    struct Flight {
        control::StepId step;
        std::size_t samples;
        std::vector<std::int32_t> propose_counts;
    };
    // Anything that a draft model could say.
    struct Said {
        std::vector<std::int32_t> starts, tokens;
        std::vector<float> chances;
        control::Proposed view() const { return {starts, tokens, chances}; }
    };

    void call() {
        switch (bytes_.below(14)) {
            case 0:
            case 1:
            case 2: {
                const std::int64_t request = bytes_.number();
                control::Submission wish{
                    .id = control::RequestId(request),
                    .prompt = bytes_.tokens(40),
                    .stop_token_ids = bytes_.tokens(3),
                    .max_new_tokens = bytes_.number(),
                    .min_new_tokens = bytes_.number(),
                    .salt = static_cast<std::uint64_t>(bytes_.number()),
                    .priority = bytes_.token(),
                    .handover = static_cast<control::Handover>(std::max(0, bytes_.below(12) - 9)),
                    .tenant = control::TenantId(bytes_.byte())};
                scheduler_.submit(std::move(wish));
                demand(live_.insert(request).second, "an id was accepted twice");
                return;
            }
            case 3:
                return scheduler_.abort(control::RequestId(bytes_.number()));
            case 4:  // a commit of anything
                return commit_anything();
            case 5:
            case 6:
            case 7:
                return commit(true);
            case 8:
                static_cast<void>(scheduler_.flush_cache());
                static_cast<void>(scheduler_.stats());
                return;
            case 9:
                scheduler_.record_cache_events(bytes_.below(2) == 1);
                static_cast<void>(scheduler_.take_cache_events());
                static_cast<void>(scheduler_.tokens(control::RequestId(bytes_.number())));
                return;
            case 10:  // the end of any transfer
                return transferred(bytes_.number(), bytes_.below(2) == 0);
            case 11:
                if (!transfers_.empty()) {
                    transferred(*transfers_.begin(), bytes_.below(4) > 0);
                }
                return;
            default:
                static_cast<void>(launch());
        }
    }

    // What is accepted must be under way; a second report before the first is applied is ignored.
    void transferred(std::int64_t transfer, bool complete) {
        scheduler_.transferred(control::TransferId(transfer), complete);
        demand(transfers_.contains(transfer) || reported_.contains(transfer),
               "the end of a transfer was accepted that never began");
        transfers_.erase(transfer);
        reported_.insert(transfer);
    }

    bool launch() {
        now_us_ = std::max(now_us_, bytes_.number());
        const auto plan = scheduler_.plan(now_us_);
        reported_.clear();
        if (plan) transfers_.insert(plan->transfers.ids.begin(), plan->transfers.ids.end());
        if (plan) {
            flights_.push_back({plan->step, plan->sample_rows.size(), plan->propose_counts});
        }
        return plan.has_value();
    }

    // As many as were asked for, or a few less or more; or what is none.
    Said proposals(const Flight& flight) {
        Said said;
        if (flight.propose_counts.empty() || bytes_.below(4) == 0) return said;
        said.starts.push_back(0);
        for (const std::int32_t asked : flight.propose_counts) {
            const std::int32_t change = bytes_.below(12);
            const std::int32_t count =
                std::max(0, asked - (change == 1) - 2 * (change == 2) + (change == 3));
            for (std::int32_t i = 0; i < count; ++i) {
                said.tokens.push_back(bytes_.token());
                said.chances.push_back(std::bit_cast<float>(bytes_.byte() * 0x01010101U));
            }
            said.starts.push_back(static_cast<std::int32_t>(said.tokens.size()));
        }
        switch (bytes_.below(24)) {
            case 0:
                said.starts = bytes_.tokens(6);
                break;
            case 1:
                said.starts.back() = bytes_.token();
                break;
            case 2:
                said.chances.push_back(1.0F);
                break;
            default:
                break;
        }
        return said;
    }

    static bool fits(const Said& said, const Flight& flight) {
        if (said.starts.empty() && said.tokens.empty() && said.chances.empty()) return true;
        if (said.starts.size() != flight.propose_counts.size() + 1) return false;
        for (std::size_t row = 0; row < flight.propose_counts.size(); ++row) {
            const std::int32_t count = said.starts[row + 1] - said.starts[row];
            if (count < 0 || count > flight.propose_counts[row]) return false;
        }
        return said.starts.front() == 0 && said.tokens.size() == said.chances.size() &&
               static_cast<std::size_t>(said.starts.back()) == said.tokens.size() &&
               std::ranges::none_of(said.tokens, [](std::int32_t token) { return token < 0; });
    }

    // What is accepted must be right.
    void commit_anything() {
        const control::StepId step(bytes_.number());
        const std::vector<std::int32_t> tokens = bytes_.tokens(6);
        scheduler_.commit(step, tokens, bytes_.number());
        demand(!flights_.empty() && flights_.front().step == step &&
                   flights_.front().samples == tokens.size() &&
                   std::ranges::none_of(tokens, [](std::int32_t token) { return token < 0; }),
               "a commit was accepted that is none");
        flights_.erase(flights_.begin());
    }

    // As an engine would, except for the tokens.
    void commit(bool any_token) {
        if (flights_.empty()) return;
        std::vector<std::int32_t> tokens(flights_.front().samples, 1);
        if (any_token) {
            for (std::int32_t& token : tokens) token = bytes_.token();
        }
        const Said said = any_token ? proposals(flights_.front()) : Said{};
        scheduler_.commit(flights_.front().step, tokens, now_us_, said.view());
        demand(fits(said, flights_.front()), "proposals were accepted that nobody asked for");
        demand(std::ranges::none_of(tokens, [](std::int32_t token) { return token < 0; }),
               "a negative token was accepted");
        flights_.erase(flights_.begin());
    }

    void collect() {
        const control::Outcome outcome = scheduler_.take_outcome();
        for (const std::int64_t request : outcome.requests) {
            demand(live_.contains(request) ||
                       std::ranges::find(outcome.finished, request) != outcome.finished.end(),
                   "a token of a request that is not live");
        }
        for (const std::int64_t request : outcome.finished) {
            demand(live_.erase(request) == 1, "a terminal event of a request that is not live");
        }
    }

    void drain() {
        for (int turn = 0, idle = 0; turn < 100'000; ++turn) {
            for (const std::int64_t transfer : std::set(transfers_)) transferred(transfer, true);
            const bool launched = launch();
            const bool commits = !launched && !flights_.empty();
            if (commits) commit(false);
            collect();
            // A plan that sends somebody away may launch nothing; the next one does.
            idle = launched || commits || !transfers_.empty() ? 0 : idle + 1;
            if (idle < 3) continue;
            scheduler_.audit();
            const control::Stats stats = scheduler_.stats();
            demand(live_.empty() && stats.pages_active == 0 && stats.transferring == 0,
                   "requests never end");
            return;
        }
        demand(false, "the scheduler does not come to rest");
    }

    control::Scheduler scheduler_;
    Bytes& bytes_;
    std::vector<Flight> flights_;
    std::set<std::int64_t> live_;
    std::set<std::int64_t> transfers_;  // under way
    std::set<std::int64_t> reported_;   // since the last plan
    std::int64_t now_us_ = 0;
};

}  // namespace

}  // namespace tokenspeed::proof

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace tokenspeed;
    proof::Bytes bytes({data, size});
    const control::Config config = proof::configuration(bytes);
    try {
        proof::Caller(config, bytes).run();
    } catch (const control::ConfigError&) {
        // Said once, before anything is held.
    }
    return 0;
}
