// Seeded random runs at realistic sizes: `random_runs EVENTS [SEED [AUDIT_EVERY]]`.
//
// 64 slots, pages of 32 tokens, contexts up to 50K tokens: conversations grow turn by turn,
// sub-agents fork off them, prompts of other tenants come between, clients go away. Odd seeds have
// long prompts and 4,000 pages; even ones many short prompts with long answers on 1,600, so that
// pages run out. In three of four, plans come with drafts, right for some way. Whatever happens,
// every request gets what it gets alone. The seed that is printed replays a run.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <random>
#include <vector>

#include "last_words.h"
#include "world.h"
#include "wrong.h"

namespace tokenspeed::proof {

namespace {

constexpr std::int32_t kVocabulary = 1000;
constexpr std::int32_t kContext = 50'000;
constexpr std::size_t kLiveMax = 160;
constexpr std::size_t kRemembered = 400;

class RandomRun {
  public:
    RandomRun(std::uint64_t seed, std::int64_t audit_every)
        : random_(seed),
          crowded_(seed % 2 == 0),
          config_{.groups = {{.kind = control::GroupKind::kFull,
                              .pages = crowded_ ? 1600 : 4000,
                              .host_pages = 0,
                              .window = 0,
                              .checkpoint_pages = 0}},
                  .page_size = 32,
                  .slots_max = 64,
                  .step_tokens_max = 8192,
                  .context_max = kContext,
                  .overlap_depth = static_cast<std::int32_t>(seed % 3),
                  .prefix_cache = seed % 8 != 7,
                  .cache_policy =
                      seed % 7 == 6 ? control::CachePolicy::kLru : control::CachePolicy::kSession,
                  .tps_floor = seed % 5 == 4 ? std::optional(40.0) : std::nullopt,
                  .queue_timeout_us = seed % 3 == 2 ? std::optional(5'000'000) : std::nullopt,
                  .step_drafts_max = seed % 4 != 1 ? 96 : 0,
                  .step_proposals_max = seed % 4 > 1 ? 64 : 0,
                  .proposal_length_max = seed % 4 > 1 ? 8 : 0},
          world_(config_, {.scribble = false, .audit_every = audit_every, .step_us = 9'000}) {}

    void run(std::int64_t events) {
        for (std::int64_t event = 0; event < events; ++event) one_event();
        world_.drain(10 * 1000 * 1000);
    }

    void print_summary() const {
        const control::Stats stats = world_.scheduler().stats();
        std::printf(
            "%lld requests, %lld steps, %lld tokens out, %lld of %lld prompt tokens "
            "cached, %lld of %lld drafted tokens right, %lld proposed, "
            "%lld retractions, %lld evictions",
            static_cast<long long>(next_), static_cast<long long>(stats.steps),
            static_cast<long long>(stats.output_tokens),
            static_cast<long long>(stats.cached_tokens),
            static_cast<long long>(stats.prompt_tokens),
            static_cast<long long>(stats.accepted_tokens),
            static_cast<long long>(stats.drafted_tokens),
            static_cast<long long>(stats.proposed_tokens),
            static_cast<long long>(stats.retractions), static_cast<long long>(stats.evictions));
    }

  private:
    struct Past {
        std::int64_t request;
        Script script;
    };

    std::int64_t below(std::int64_t bound) {
        return std::uniform_int_distribution<std::int64_t>(0, bound - 1)(random_);
    }
    bool chance(double probability) {
        return std::uniform_real_distribution<>()(random_) < probability;
    }
    template <class T>
    T one_of(std::initializer_list<T> choices) {
        return *(choices.begin() + below(static_cast<std::int64_t>(choices.size())));
    }

    void one_event() {
        const double draw = std::uniform_real_distribution<>()(random_);
        if (draw < 0.02 && world_.live_count() < kLiveMax) return submit();
        if (draw < 0.024 && next_ > 0) {
            world_.abort(
                past_[static_cast<std::size_t>(below(static_cast<std::int64_t>(past_.size())))]
                    .request);
            return;
        }
        if (draw < 0.0241) return world_.flush();
        if (draw < 0.55 && world_.in_flight()) return world_.commit();
        world_.launch([this] { return guessing(); }, chance(0.3),
                      chance(0.5) ? static_cast<std::size_t>(below(10)) : 0,
                      [this] { return insight(); });
    }

    // Drafts of up to 12 tokens, right for some way.
    std::optional<Guessing> guessing() {
        if (!chance(0.6)) return std::nullopt;
        const auto tokens = static_cast<std::size_t>(below(13));
        return Guessing{tokens, static_cast<std::size_t>(below(14))};
    }

    // Proposals that are right for some way, and as short as the model likes.
    Device::Insight insight() {
        return {static_cast<std::size_t>(below(10)), static_cast<std::size_t>(below(4))};
    }

    void submit() {
        Script script;
        script.prompt = prompt();
        script.max_new_tokens = one_of<std::int64_t>({1, 40, 400, 1500, 4000});
        script.min_new_tokens = one_of<std::int64_t>({0, 0, 5});
        script.salt = one_of<std::uint64_t>({0, 0, 0, 7});
        script.priority = one_of<std::int32_t>({0, 0, 0, 1, -1});
        for (std::int64_t stops = one_of<std::int64_t>({0, 1, 8}); stops > 0; --stops) {
            script.stop_token_ids.push_back(static_cast<std::int32_t>(below(kVocabulary)));
        }
        rehearse(script, kVocabulary, kContext);
        past_.push_back({next_, std::move(script)});
        world_.submit(next_++, past_.back().script);
        // What ended long ago is forgotten, when no step may still carry it.
        while (!world_.in_flight() && past_.size() > kRemembered &&
               !world_.live(past_.front().request)) {
            world_.forget(past_.front().request);
            past_.pop_front();
        }
    }

    // Often an earlier conversation and its answer, or the beginning of one.
    std::vector<std::int32_t> prompt() {
        std::vector<std::int32_t> tokens;
        if (!past_.empty() && chance(0.8)) {
            const Past& base = past_[past_.size() - 1 -
                                     static_cast<std::size_t>(below(static_cast<std::int64_t>(
                                         std::min<std::size_t>(past_.size(), 40))))];
            const auto known = base.script.prompt.size() + world_.outputs(base.request);
            tokens.assign(base.script.history.begin(),
                          base.script.history.begin() + static_cast<std::ptrdiff_t>(known));
            if (chance(0.3)) tokens.resize(static_cast<std::size_t>(below(tokens.size() + 1)));
        }
        for (std::int64_t fresh = (crowded_ ? one_of<std::int64_t>({1, 30, 200, 1000})
                                            : one_of<std::int64_t>({1, 200, 1000, 30000})) *
                                  one_of<std::int64_t>({1, 1, 2}) / 2;
             fresh >= 0; --fresh) {
            tokens.push_back(static_cast<std::int32_t>(below(kVocabulary)));
        }
        if (tokens.size() >= kContext) {
            tokens.resize(static_cast<std::size_t>(1 + below(kContext - 1)));
        }
        return tokens;
    }

    std::mt19937_64 random_;
    bool crowded_;
    control::Config config_;
    World world_;
    std::deque<Past> past_;
    std::int64_t next_ = 0;
};

}  // namespace

}  // namespace tokenspeed::proof

int main(int count, char** arguments) {
    const std::int64_t events = count > 1 ? std::atoll(arguments[1]) : 20'000;
    const std::uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
    const std::int64_t audit_every = count > 3 ? std::atoll(arguments[3]) : 1;
    tokenspeed::proof::last_words_begin("random run, seed " + std::to_string(seed));
    tokenspeed::proof::print_last_words_on_abort();
    try {
        tokenspeed::proof::RandomRun run(seed, audit_every);
        run.run(events);
        std::printf("seed %llu: %lld events, ", static_cast<unsigned long long>(seed),
                    static_cast<long long>(events));
        run.print_summary();
        std::printf("\n");
    } catch (const std::exception& error) {
        std::fprintf(stderr, "WRONG: seed %llu: %s\n", static_cast<unsigned long long>(seed),
                     error.what());
        return 1;
    }
    return 0;
}
