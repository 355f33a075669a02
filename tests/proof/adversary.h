// Drafts that are right as far as it is told, and then wrong: it knows what every request gets.
// Where it is told nothing, what the draft model proposed is the draft.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "draft_source.h"
#include "storage.h"

namespace tokenspeed::proof {

// How long the drafts of a plan are, and how many of their first tokens are right.
struct Guessing {
    std::size_t tokens = 0;
    std::size_t right = 0;
};

class Adversary final : public control::DraftSource {
  public:
    using Told = std::function<History(std::int64_t)>;
    // For each row of a plan; absent: no draft.
    using Choose = std::function<std::optional<Guessing>()>;

    explicit Adversary(Told told) : told_(std::move(told)) {}

    // From the next plan on. Who is in flight is left out of it if `rests`; of each row that
    // samples so many tokens are asked of the draft model.
    void set(Choose choose, bool rests, std::size_t asks) {
        choose_ = std::move(choose);
        rests_ = rests;
        asks_ = asks;
    }

    void follow(std::span<const control::Request* const>) override {}
    void draft(std::span<Row> rows, const Step&, const control::StepTimeModel&) override {
        for (Row& row : rows) {
            const auto guessing = choose_ ? choose_() : std::nullopt;
            if (!guessing) {
                row.draft = row.proposal->tokens;
                continue;
            }
            const History history = told_(row.request->id().value);
            const auto known = static_cast<std::size_t>(row.request->known().value);
            // Longer than it may be, now and then: what is too much is cut.
            for (std::size_t i = 0; i < guessing->tokens; ++i) {
                const std::int32_t right =
                    known + i < history.tokens.size() ? history.tokens[known + i] : 0;
                row.draft.push_back(i < guessing->right ? right : right + 1);
            }
        }
    }
    // More than it may, now and then: what is too much is cut.
    void propose(std::span<Ask> rows, const Step&, const control::StepTimeModel&) override {
        for (Ask& ask : rows) ask.count = control::TokenCount(static_cast<std::int32_t>(asks_));
    }
    bool wants_rest(const control::Request&) override { return rests_; }
    void ended(control::RequestId) noexcept override {}

  private:
    Told told_;
    Choose choose_;
    bool rests_ = false;
    std::size_t asks_ = 0;
};

}  // namespace tokenspeed::proof
