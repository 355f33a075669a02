// What the draft model is asked for with a step, and how it is taken in with the step's return.

#include <algorithm>
#include <cmath>

#include "scheduler.h"

namespace tokenspeed::control {

namespace {

// Tokens to come of an answer while nothing is known of how long answers get.
constexpr std::int32_t kRemainingUnknown = 256;

}  // namespace

bool Scheduler::prompts_wait() const noexcept {
    return turns_.head().has_value() || std::ranges::any_of(order_, [&](SlotId slot) {
               return prompt_left(slot) > TokenCount(0);
           });
}

// Says of the rows from `first` on how many tokens the draft model shall propose for each, once its
// samples are known.
void Scheduler::draft_proposals(std::size_t first) {
    if (step_proposals_max_ == 0) return;
    asks_.clear();
    StepWork work;
    TokenCount longest;
    TokenCount left(step_proposals_max_);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
        const Row& row = rows_[i];
        left -= TokenCount(row.propose);
        if (!row.samples) continue;
        work.add_decode(row.start);
        longest = std::max(longest, row.start);
        if (i < first) continue;
        const Stepping* flies = stepping_.at(row.slot);
        const TokenCount pending = flies != nullptr ? flies->pending : TokenCount(0);
        // The row brings a token, and whoever verifies a draft samples one beyond it.
        const Request& request = running(row.slot);
        const TokenCount most = std::min(request.remaining(context_max_) - pending - TokenCount(2),
                                         TokenCount(proposal_length_max_));
        if (most <= TokenCount(0)) continue;
        const TokenCount outputs = request.outputs() + pending;
        const auto whole = answers_.expected(outputs, request.outputs_max());
        const TokenCount remaining =
            std::min(request.remaining(context_max_) - pending - TokenCount(1),
                     whole ? *whole - outputs : TokenCount(kRemainingUnknown));
        asks_.push_back({.request = &request,
                         .most = most,
                         .remaining = remaining,
                         .begins = outputs == TokenCount(0),
                         .count = TokenCount(0),
                         .reads = TokenCount(0)});
    }
    if (asks_.empty() || left <= TokenCount(0)) return;
    std::optional<double> limit_us;
    if (floor_.held() && work.decode_rows > 1) limit_us = floor_.limit_us(model_, longest);
    const bool overlaps = ledger_.depth() > 0;
    drafts_->propose(asks_, {work, left, prompts_wait(), limit_us, overlaps}, model_);
    auto ask = asks_.begin();
    for (std::size_t i = first; i < rows_.size() && ask != asks_.end(); ++i) {
        if (&running(rows_[i].slot) != ask->request) continue;
        const TokenCount count = std::min({ask->count, ask->most, left});
        rows_[i].propose = count.value;
        if (count > TokenCount(0)) rows_[i].reads = ask->reads.value;
        left -= count;
        ++ask;
    }
}

// Throws EngineError where what is proposed is not what was asked for.
void Scheduler::check_proposed(const Flight& flight, const Proposed& proposed) const {
    const auto refuse = [&](const std::string& why) {
        throw EngineError("step " + text(flight.step.value) + " " + why);
    };
    const auto [starts, tokens, chances, caught_up] = proposed;
    if (caught_up < 0) refuse("caught up on " + text(caught_up) + " tokens");
    if (tokens.size() != chances.size()) {
        refuse("proposed " + text(static_cast<std::int64_t>(tokens.size())) + " tokens with " +
               text(static_cast<std::int64_t>(chances.size())) + " chances");
    }
    if (starts.empty() && tokens.empty()) return;
    const std::size_t rows = flight.rows.size();
    if (starts.size() != rows + 1 || starts.front() != 0 ||
        starts.back() != static_cast<std::int64_t>(tokens.size())) {
        refuse("has " + text(static_cast<std::int64_t>(rows)) + " rows and " +
               text(static_cast<std::int64_t>(tokens.size())) +
               " proposed tokens, but proposed_starts does not go from 0 to there in rows + 1");
    }
    for (std::size_t row = 0; row < rows; ++row) {
        const std::int64_t count = std::int64_t{starts[row + 1]} - starts[row];
        if (count >= 0 && count <= flight.rows[row].propose) continue;
        refuse("was to propose at most " + text(flight.rows[row].propose) + " tokens for row " +
               text(static_cast<std::int64_t>(row)) + ", but proposed " + text(count));
    }
    if (std::ranges::any_of(tokens, [](std::int32_t token) { return token < 0; })) {
        refuse("proposed a negative token id");
    }
}

// Everything that the rows of a returning step are given; the draft model took the time that this
// took.
void Scheduler::reserve_proposals(Flight& flight, const Proposed& proposed) {
    proposals_.clear();
    flight.work.proposed_tokens = flight.work.proposal_rounds = flight.work.caught_up_tokens = 0;
    if (proposed.starts.empty()) return;
    flight.work.caught_up_tokens = proposed.caught_up;
    const auto chance = [](float told) {
        return std::isnan(told) ? 0.0F : std::clamp(told, 0.0F, 1.0F);
    };
    for (std::size_t row = 0; row < flight.rows.size(); ++row) {
        const auto begin = static_cast<std::size_t>(proposed.starts[row]);
        const auto count = static_cast<std::size_t>(proposed.starts[row + 1]) - begin;
        if (count == 0) continue;
        const auto tokens = proposed.tokens.subspan(begin, count);
        const auto chances = proposed.chances.subspan(begin, count);
        Proposal proposal{{tokens.begin(), tokens.end()}, {}};
        proposal.chances.reserve(count);
        std::ranges::transform(chances, std::back_inserter(proposal.chances), chance);
        proposals_.emplace_back(flight.rows[row].slot, std::move(proposal));
        flight.work.add_proposal(static_cast<std::int64_t>(count));
    }
}

// What the returning step proposes for the request in a slot.
Proposal Scheduler::proposal_of(SlotId slot) noexcept {
    const auto found = std::ranges::find(proposals_, slot, [](auto& entry) { return entry.first; });
    return found == proposals_.end() ? Proposal{} : std::move(found->second);
}

}  // namespace tokenspeed::control
