// What a step will take: microseconds as a linear function of what it runs, fitted as steps return.
//
// Time = constant + prefill tokens (matrix products) + decode rows + drafted tokens beyond one a
//        row + tokens that a draft model proposes + its forward passes, one after the other +
//        tokens that it reads before + KV tokens that rows read + pairs of (prompt token, context
//        token) that prefill attention visits.
//
// A row reads its context once, be it a decode row or a chunk: what small chunks of a long prompt
// cost is mostly that, and not their pairs.
//
// Weighted least squares over the recent past, each observation weighed by 1/time^2 so that errors
// count in proportion. No coefficient is negative. What recent steps do not tell (the price of
// prompts while everybody decodes) stays as it was last known: each kind of step forgets only when
// another of its kind returns, and each solution is drawn a little towards the one before it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "ids.h"

namespace tokenspeed::control {

// What a step runs, as far as its time depends on it.
struct StepWork {
    std::int64_t prefill_tokens = 0;
    std::int64_t decode_rows = 0;
    std::int64_t draft_tokens = 0;      // guesses of decode rows, beyond one token each
    std::int64_t proposed_tokens = 0;   // by a draft model, over all rows
    std::int64_t proposal_rounds = 0;   // its forward passes: the longest proposal of a row
    std::int64_t caught_up_tokens = 0;  // that it reads first, beyond the last of each row
    std::int64_t context_tokens = 0;    // contexts of all rows, which attention reads
    double prefill_pairs = 0;           // sum over chunks of chunk * (context + chunk / 2)

    void add_decode(TokenCount context) noexcept {
        decode_rows += 1;
        context_tokens += context.value;
    }
    void add_proposal(std::int64_t tokens) noexcept {
        proposed_tokens += tokens;
        proposal_rounds = std::max(proposal_rounds, tokens);
    }
    void add_chunk(TokenCount context, TokenCount chunk) noexcept {
        prefill_tokens += chunk.value;
        context_tokens += context.value;
        prefill_pairs += static_cast<double>(chunk.value) *
                         (static_cast<double>(context.value) + 0.5 * chunk.value);
    }
};

class StepTimeModel {
  public:
    // A step that ran `work` took so long. What is not positive tells nothing and is ignored.
    void observe(const StepWork& work, std::int64_t took_us) noexcept;

    // Microseconds a step of this work takes on average; 0 before anything was observed.
    double predict_us(const StepWork& work) const noexcept;

    // The largest chunk at `context`, at most `most`, that keeps the average time of `work` and
    // the chunk within `limit_us`.
    TokenCount chunk_within(double limit_us, const StepWork& work, TokenCount context,
                            TokenCount most) const noexcept;

    // What 99 of 100 steps with decode rows stay under, in predicted times: 1 or a little more.
    double spread() const noexcept { return spread_; }
    // Whether enough steps were seen to build on.
    bool trusted() const noexcept { return observations_ >= kTrustedAfter; }
    // What one drafted token more adds to a step, in microseconds: that of a decode row before any
    // was seen; beside a prompt no less than a prompt token, whose place it takes.
    double draft_token_us(bool prompts) const noexcept;
    // What proposing adds: each token, and each forward pass of the draft model, which all rows
    // that propose run together. Before any was seen a pass is taken for an eighth of a row's step.
    double proposed_token_us() const noexcept { return cost_us_[kProposedToken]; }
    double proposal_round_us() const noexcept { return cost_us_[kProposalRound]; }
    // What each token adds that a draft model reads first: before any was seen, an eighth of what a
    // prompt token does.
    double caught_up_token_us() const noexcept { return cost_us_[kCaughtUpToken]; }
    // How many drafted tokens a step may have for its time to be foretold: twice as many as ever.
    std::int64_t draft_tokens_within_reach() const noexcept {
        return std::max(2 * drafts_seen_, kFirstDrafts);
    }
    // As many proposed ones.
    std::int64_t proposed_tokens_within_reach() const noexcept {
        return std::max(2 * proposed_seen_, kFirstDrafts);
    }

  private:
    // What each coefficient is for.
    enum Term : std::size_t {
        kStep,
        kPrefillToken,
        kDecodeRow,
        kDraftToken,
        kContextToken,
        kPair,
        kProposedToken,
        kProposalRound,
        kCaughtUpToken,
        kTerms
    };
    using Terms = std::array<double, kTerms>;
    static Terms terms(const StepWork& work) noexcept;
    double calm(double predicted_us, double took_us) noexcept;
    void learn_spread(double predicted_us, double took_us) noexcept;
    void solve() noexcept;

    // Sums of one kind of step: of products of terms, and of terms and time.
    struct Moments {
        std::array<Terms, kTerms> squares{};
        Terms times{};

        void fade(double keep) noexcept;
        void add(const Terms& x, double weight, double time) noexcept;
    };
    // Decode only, prefill only, mixed, any with drafts, any with proposals, and with a text that a
    // draft model begins to read.
    std::array<Moments, 6> kinds_;

    Terms cost_us_{};
    double spread_ = 1.05;
    std::int32_t strays_ = 0;  // surprises in a row, too slow (positive) or too fast (negative)
    std::int64_t observations_ = 0;
    std::int64_t rows_seen_ = 0;    // the most decode rows of any step
    std::int64_t drafts_seen_ = 0;  // the most drafted tokens of any step
    std::int64_t draft_steps_ = 0;
    std::int64_t proposed_seen_ = 0;  // the most proposed tokens of any step
    std::int64_t proposal_steps_ = 0;
    std::int64_t reading_steps_ = 0;
    static constexpr std::int64_t kFirstDrafts = 2;
    // Fewer are what accepted proposals leave to be read.
    static constexpr std::int64_t kReadingMin = 32;
    static constexpr std::int64_t kTrustedAfter = 8;
};

}  // namespace tokenspeed::control
