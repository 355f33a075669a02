#include "proposer.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "draft_lengths.h"

namespace tokenspeed::control {

namespace {

// The highest probability of each class; the last class has none.
constexpr std::array<float, ProposalRecord::kClasses - 1> kClassEnds{.1F, .25F, .4F,  .55F,
                                                                     .7F, .82F, .92F, .98F};
// Of a probability, what it is taken to be worth before any was put to the test; and what a token
// is worth of which not even that is known. So many tokens outweigh it.
constexpr double kFirstTrust = 0.9, kFirstChance = 0.6;
constexpr double kFirstWeight = 4;
// As many of its own tokens outweigh what others' were worth.
constexpr double kOthersWeight = 4;
constexpr double kKeepOwn = 0.98;  // a request remembers about fifty tokens of a class
constexpr double kKeepAll = 0.998;
// What is less likely is never worth its time.
constexpr double kChanceMin = 0.05;
// Of a step, the least that a proposed token is taken to add.
constexpr double kPriceShareMin = 0.002;
// Where others are asked, one joins them that was not asked in so many plans: no pass more.
constexpr std::int64_t kJoins = 64;
// Asks that bring nothing are made again after 2, 4, ... plans, up to so many doublings.
constexpr std::int32_t kSilentMax = 10;

}  // namespace

// --- what proposals were worth ------------------------------------------------------------------

void ProposalRecord::Tally::note(bool right, double keep) noexcept {
    tries = tries * keep + 1;
    hits = hits * keep + (right ? 1 : 0);
}

double ProposalRecord::Tally::chance(double prior, double weight) const noexcept {
    return (hits + prior * weight) / (tries + weight);
}

namespace {

std::size_t depth_class(std::size_t depth) noexcept {
    return std::min(depth, ProposalRecord::kDepths - 1);
}
std::size_t chance_class(float told) noexcept {
    return static_cast<std::size_t>(std::ranges::lower_bound(kClassEnds, told) -
                                    kClassEnds.begin());
}

}  // namespace

void ProposalRecord::note(std::size_t depth, float told, bool right, double keep) noexcept {
    told_[depth_class(depth)][chance_class(told)].note(right, keep);
    deep_[depth_class(depth)].note(right, keep);
}

double ProposalRecord::chance(std::size_t depth, float told, double prior,
                              double weight) const noexcept {
    return told_[depth_class(depth)][chance_class(told)].chance(prior, weight);
}

double ProposalRecord::chance(std::size_t depth, double prior, double weight) const noexcept {
    return deep_[depth_class(depth)].chance(prior, weight);
}

// --- learning -----------------------------------------------------------------------------------

void Proposer::follow(std::span<const Request* const> running) noexcept {
    ++plans_;
    if (books_.empty()) return;
    for (const Request* request : running) {
        const auto found = books_.find(request->id().value);
        if (found == books_.end() || found->second.proposal.tokens.empty()) continue;
        Book& book = found->second;
        const std::vector<std::int32_t>& tokens = request->tokens();
        if (tokens.size() == book.known) continue;
        const std::size_t most = std::min(book.proposal.tokens.size(), tokens.size() - book.known);
        for (std::size_t i = 0; i < most; ++i) {
            const bool right = book.proposal.tokens[i] == tokens[book.known + i];
            const float told = book.proposal.chances[i];
            book.record.note(i, told, right, kKeepOwn);
            record_.note(i, told, right, kKeepAll);
            if (!right) break;
        }
        book.proposal.tokens.clear();
    }
}

std::vector<float> Proposer::weigh(const Request& request, const Proposal& proposal,
                                   std::size_t most, double rival) {
    std::vector<float> found;
    const auto place = books_.find(request.id().value);
    if (place == books_.end()) return found;
    Book& book = place->second;
    book.rival = rival;
    if (proposal.tokens.empty()) {
        if (book.asked) {
            book.silent = std::min(book.silent + 1, kSilentMax);
            book.mute_until = plans_ + (std::int64_t{1} << book.silent);
        }
        book.asked = false;
        return found;
    }
    // Copied first: memory may run out between its parts.
    Proposal copy = proposal;
    book.proposal = std::move(copy);
    book.known = request.tokens().size();
    book.asked = false;
    book.silent = 0;
    double all = 1;
    for (std::size_t i = 0; i < std::min(most, proposal.tokens.size()); ++i) {
        const float told = proposal.chances[i];
        const double others = record_.chance(i, told, kFirstTrust * told, kFirstWeight);
        all *= book.record.chance(i, told, others, kOthersWeight);
        if (all < kChanceMin) break;
        found.push_back(static_cast<float>(all));
    }
    return found;
}

// --- asking -------------------------------------------------------------------------------------

// Of each token that may be proposed, the chance that it and all before it will be right.
std::vector<float> Proposer::hopes(const Book& book, std::size_t most) const {
    std::vector<float> found;
    double all = 1, chance = kFirstChance;
    for (std::size_t i = 0; i < most; ++i) {
        // Where nothing is known so deep, the chance is that of the token before.
        const double others = record_.chance(i, chance, kFirstWeight);
        chance = book.record.chance(i, others, kOthersWeight);
        all *= chance;
        if (all < kChanceMin) break;
        found.push_back(static_cast<float>(all));
    }
    return found;
}

void Proposer::ask(std::span<DraftSource::Ask> rows, const DraftSource::Step& step,
                   const StepTimeModel& model) {
    if (!model.trusted()) return;
    Chances hopes(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const Book& book = books_[rows[i].request->id().value];
        if (plans_ < book.mute_until) continue;
        hopes[i] = this->hopes(book, static_cast<std::size_t>(rows[i].most.value));
        const double expected = std::accumulate(hopes[i].begin(), hopes[i].end(), 0.0);
        // Who skips a step for it must get a token more than it gives up.
        if (expected <= book.rival || (step.overlaps && expected <= 1)) hopes[i].clear();
    }
    const std::vector<std::size_t> counts = this->counts(hopes, step, model);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        rows[i].count = TokenCount(static_cast<std::int32_t>(counts[i]));
    }
    explore(rows, step, model);
    for (const DraftSource::Ask& row : rows) {
        if (row.count == TokenCount(0)) continue;
        Book& book = books_.find(row.request->id().value)->second;
        book.asked = true;
        book.asked_at = plans_;
    }
}

// How many for each row give the most tokens a second, of every number of passes that the draft
// model may make: a pass serves all rows that propose so many tokens.
std::vector<std::size_t> Proposer::counts(const Chances& hopes, const DraftSource::Step& step,
                                          const StepTimeModel& model) const {
    const auto rows = static_cast<std::size_t>(step.work.decode_rows);
    const double step_us = model.predict_us(step.work);
    const double round_us = model.proposal_round_us();
    const double token_us = std::max(model.proposed_token_us() + model.draft_token_us(step.prompts),
                                     kPriceShareMin * step_us);
    const auto most = static_cast<std::size_t>(
        std::min<std::int64_t>(step.most.value, model.proposed_tokens_within_reach()));
    std::vector<std::size_t> best(hopes.size());
    double best_rate = static_cast<double>(rows) / step_us;
    Chances within(hopes.size());
    for (std::size_t rounds = 1;; ++rounds) {
        bool deeper = false;
        for (std::size_t i = 0; i < hopes.size(); ++i) {
            if (hopes[i].size() < rounds) continue;
            within[i].push_back(hopes[i][rounds - 1]);
            deeper = true;
        }
        if (!deeper) return best;
        const double began_us = step_us + static_cast<double>(rounds) * round_us;
        const std::vector<std::size_t> lengths =
            draft_lengths(within, rows, {began_us, token_us, step.limit_us}, most);
        auto tokens = static_cast<double>(rows);
        double time_us = began_us;
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            tokens = std::accumulate(within[i].begin(),
                                     within[i].begin() + static_cast<std::ptrdiff_t>(lengths[i]),
                                     tokens);
            time_us += token_us * static_cast<double>(lengths[i]);
        }
        if (tokens / time_us <= best_rate) return best;
        best_rate = tokens / time_us;
        best = lengths;
    }
}

// One row that was not asked for long is given a token, where that costs no pass of the draft model
// or there was none for long.
void Proposer::explore(std::span<DraftSource::Ask> rows, const DraftSource::Step& step,
                       const StepTimeModel& model) {
    TokenCount asked;
    for (const DraftSource::Ask& row : rows) asked += row.count;
    const bool joins = asked > TokenCount(0);
    if (joins) {
        idle_ = 0;
        patience_ = kPatience;
    } else if (++idle_ < patience_) {
        return;
    }
    if (asked >= step.most) return;
    const double time_us = model.predict_us(step.work) + model.proposal_round_us() +
                           model.proposed_token_us() * (asked.value + 1.0);
    if (step.limit_us && time_us > *step.limit_us) return;
    DraftSource::Ask* longest = nullptr;
    std::int64_t since = joins ? plans_ - kJoins : plans_;
    for (DraftSource::Ask& row : rows) {
        const Book& book = books_.find(row.request->id().value)->second;
        if (row.count > TokenCount(0) || plans_ < book.mute_until || book.rival > 1) continue;
        if (book.asked_at > since) continue;
        since = book.asked_at;
        longest = &row;
    }
    if (longest == nullptr) return;
    longest->count = TokenCount(1);
    if (joins) return;
    idle_ = 0;
    patience_ = std::min(2 * patience_, kPatienceMax);
}

}  // namespace tokenspeed::control
