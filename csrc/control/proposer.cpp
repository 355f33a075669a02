#include "proposer.h"

#include <algorithm>
#include <cmath>
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
// What is tried: so many asks of so many tokens, of a request that was not asked in so many plans.
constexpr std::int32_t kTrialAsks = 16;
constexpr std::int32_t kTrialTokens = 2;
constexpr std::int64_t kTrialGap = 64;
// So few tokens to be read are what accepted proposals leave: they come with every ask.
constexpr TokenCount kLittle(32);
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

void ProposalRecord::came(std::size_t count, std::size_t asked, double keep) noexcept {
    for (std::size_t depth = 0; depth < std::min({asked, count + 1, kDepths}); ++depth) {
        came_[depth].note(depth < count, keep);
    }
}

double ProposalRecord::comes(std::size_t depth) const noexcept {
    return came_[depth_class(depth)].chance(1, kFirstWeight);
}

void ProposalRecord::earned(double tokens, double right, double keep) noexcept {
    right_ = right_ * keep + right;
    earned_ = earned_ * keep + tokens;
}

double ProposalRecord::yield(double prior, double weight) const noexcept {
    return std::clamp((earned_ + prior * weight) / (right_ + weight), 0.0, 1.0);
}

// --- learning -----------------------------------------------------------------------------------

void Proposer::follow(std::span<const Request* const> running) noexcept {
    ++plans_;
    if (books_.empty()) return;
    for (const Request* request : running) {
        const auto found = books_.find(request->id().value);
        if (found == books_.end()) continue;
        Book& book = found->second;
        // Whoever came back to a slot is not known there.
        if (book.seen + 1 != plans_) book.read = TokenCount(0);
        book.seen = plans_;
        if (book.proposal.tokens.empty()) continue;
        const std::vector<std::int32_t>& tokens = request->tokens();
        if (tokens.size() == book.known) continue;
        const std::size_t most = std::min(book.proposal.tokens.size(), tokens.size() - book.known);
        std::size_t hits = 0;
        for (std::size_t i = 0; i < most; ++i) {
            const bool right = book.proposal.tokens[i] == tokens[book.known + i];
            const float told = book.proposal.chances[i];
            book.record.note(i, told, right, kKeepOwn);
            record_.note(i, told, right, kKeepAll);
            if (!right) break;
            ++hits;
        }
        const double earned =
            book.used == 0 ? 0 : static_cast<double>(std::min(hits, book.used)) - book.rival;
        book.record.earned(earned, static_cast<double>(hits), kKeepOwn);
        record_.earned(earned, static_cast<double>(hits), kKeepAll);
        book.proposal.tokens.clear();
        book.used = 0;
    }
}

std::vector<float> Proposer::weigh(const Request& request, const Proposal& proposal,
                                   std::size_t most, double rival) {
    std::vector<float> found;
    const auto place = books_.find(request.id().value);
    if (place == books_.end()) return found;
    Book& book = place->second;
    book.rival = rival;
    const std::size_t asked = std::exchange(book.asked, 0);
    if (proposal.tokens.empty()) {
        if (asked > 0) {
            book.silent = std::min(book.silent + 1, kSilentMax);
            book.mute_until = plans_ + (std::int64_t{1} << book.silent);
        }
        return found;
    }
    // Copied first: memory may run out between its parts.
    Proposal copy = proposal;
    book.proposal = std::move(copy);
    book.known = request.tokens().size();
    book.read = request.known();
    book.silent = 0;
    if (asked > 0) record_.came(proposal.tokens.size(), asked, kKeepAll);
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

void Proposer::drafted(const Request& request, std::size_t tokens) noexcept {
    const auto found = books_.find(request.id().value);
    if (found != books_.end()) found->second.used = tokens;
}

void Proposer::ended(RequestId request) noexcept {
    const auto found = books_.find(request.value);
    if (found == books_.end()) return;
    if (found->second.trial > 0) failed();
    books_.erase(found);
}

// --- asking -------------------------------------------------------------------------------------

// Of each token that may be proposed, the chance that it and all before it will come, and be right.
std::vector<float> Proposer::hopes(const Book& book, std::size_t most) const {
    std::vector<float> found;
    double all = 1, chance = kFirstChance;
    for (std::size_t i = 0; i < most; ++i) {
        // Where nothing is known so deep, the chance is that of the token before.
        const double of_others = record_.chance(i, chance, kFirstWeight);
        chance = book.record.chance(i, of_others, kOthersWeight);
        all *= chance * record_.comes(i);
        if (all < kChanceMin) break;
        found.push_back(static_cast<float>(all));
    }
    return found;
}

// What the draft model is to read of a request before it proposes.
TokenCount Proposer::unread(const Book& book, const Request& request) const noexcept {
    return std::min(request.known() - book.read, window_);
}

// What the request's answer gains by proposals, without what is read for them: with each step the
// tokens that they bring, less their passes. Negative where there is no gain.
double Proposer::gain_us(const std::vector<float>& hopes, const DraftSource::Ask& row,
                         const Prices& prices) const {
    double best_us = -prices.round_us, tokens = 1, comes = 1, gain_us = 0;
    for (std::size_t i = 0; i < hopes.size(); ++i) {
        comes *= record_.comes(i);
        tokens += hopes[i];
        gain_us += hopes[i] * prices.value_us - comes * (prices.round_us + prices.token_us);
        best_us = std::max(best_us, gain_us * row.remaining.value / tokens);
    }
    return best_us;
}

void Proposer::ask(std::span<DraftSource::Ask> rows, const DraftSource::Step& step,
                   const StepTimeModel& model) {
    if (!model.trusted()) return;
    // A step that takes prompts along runs anyhow: only its decode rows are spared.
    const double step_us = model.predict_us(step.work);
    const double saved_us = step_us - (step.prompts ? model.predict_us(StepWork{}) : 0);
    const Prices prices{
        .value_us = saved_us / static_cast<double>(step.work.decode_rows),
        .round_us = model.proposal_round_us(),
        .token_us = std::max(model.proposed_token_us() + model.draft_token_us(step.prompts),
                             kPriceShareMin * step_us),
        .read_us = model.caught_up_token_us()};
    Chances hopes(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        Book& book = books_[rows[i].request->id().value];
        if (book.seen == 0) book.seen = plans_;
        rows[i].reads = unread(book, *rows[i].request);
        if (plans_ < book.mute_until) continue;
        hopes[i] = this->hopes(book, static_cast<std::size_t>(rows[i].most.value));
        const double expected = std::accumulate(hopes[i].begin(), hopes[i].end(), 0.0);
        const double yield = book.record.yield(record_.yield(1, kFirstWeight), kOthersWeight);
        for (float& hope : hopes[i]) hope = static_cast<float>(hope * yield);
        // Who skips a step for it must get a token more than it gives up.
        bool pays = expected > book.rival && (!step.overlaps || expected > 1);
        if (rows[i].reads > kLittle) {
            const double reads_us = prices.read_us * rows[i].reads.value;
            // Nobody waits longer for a first token, and no prompt, for what is only read.
            pays = pays && !rows[i].begins && !step.prompts &&
                   gain_us(hopes[i], rows[i], prices) > reads_us &&
                   (!step.limit_us || step_us + reads_us <= *step.limit_us);
        }
        if (!pays) hopes[i].clear();
    }
    const std::vector<std::size_t> counts = this->counts(hopes, step, model, prices, saved_us);
    credit_us_ += share_ * step_us;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        rows[i].count = TokenCount(static_cast<std::int32_t>(counts[i]));
        if (counts[i] == 0) continue;
        share_ = kShareMax;
    }
    try_some(rows, step, prices, step_us);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].count == TokenCount(0)) continue;
        Book& book = books_.find(rows[i].request->id().value)->second;
        book.asked = static_cast<std::size_t>(rows[i].count.value);
        book.asked_at = plans_;
    }
}

// How many for each row give the most tokens a second, of every number of passes that the draft
// model may make: a pass serves all rows that propose so many tokens.
std::vector<std::size_t> Proposer::counts(const Chances& hopes, const DraftSource::Step& step,
                                          const StepTimeModel& model, const Prices& prices,
                                          double saved_us) const {
    const auto rows = static_cast<std::size_t>(step.work.decode_rows);
    const double step_us = model.predict_us(step.work);
    std::optional<double> limit_us;
    if (step.limit_us) limit_us = std::max(*step.limit_us, step_us) - (step_us - saved_us);
    const auto most = static_cast<std::size_t>(
        std::min<std::int64_t>(step.most.value, model.proposed_tokens_within_reach()));
    std::vector<std::size_t> best(hopes.size());
    double best_rate = static_cast<double>(rows) / saved_us;
    double began_us = saved_us, comes = 1;
    Chances within(hopes.size());
    for (std::size_t rounds = 1;; ++rounds) {
        std::int32_t deeper = 0;
        for (std::size_t i = 0; i < hopes.size(); ++i) {
            if (hopes[i].size() < rounds) continue;
            within[i].push_back(hopes[i][rounds - 1]);
            ++deeper;
        }
        if (deeper == 0) return best;
        // A pass is made if any of these rows comes so far.
        comes *= record_.comes(rounds - 1);
        began_us += prices.round_us * (1 - std::pow(1 - comes, deeper));
        const std::vector<std::size_t> lengths =
            draft_lengths(within, rows, {began_us, prices.token_us, limit_us}, most);
        auto tokens = static_cast<double>(rows);
        double time_us = began_us;
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            tokens = std::accumulate(within[i].begin(),
                                     within[i].begin() + static_cast<std::ptrdiff_t>(lengths[i]),
                                     tokens);
            time_us += prices.token_us * static_cast<double>(lengths[i]);
        }
        if (tokens / time_us <= best_rate) return best;
        best_rate = tokens / time_us;
        best = lengths;
    }
}

// Goes on with trials, and begins one where there is credit for it: of the request that was not
// asked for longest. The first one is free.
void Proposer::try_some(std::span<DraftSource::Ask> rows, const DraftSource::Step& step,
                        const Prices& prices, double step_us) {
    TokenCount left = step.most;
    for (const DraftSource::Ask& row : rows) left -= row.count;
    const double ask_us = kTrialTokens * (prices.round_us + prices.token_us);
    DraftSource::Ask* longest = nullptr;
    std::int64_t since = plans_ - kTrialGap;
    const auto book_of = [&](const DraftSource::Ask& row) -> Book& {
        return books_.find(row.request->id().value)->second;
    };
    const auto ask = [&](DraftSource::Ask& row) {
        row.count = std::min({row.most, left, TokenCount(kTrialTokens)});
        left -= row.count;
        if (--book_of(row).trial == 0) failed();
    };
    const auto time_us = [&](const DraftSource::Ask& row) {
        return row.reads.value * prices.read_us + ask_us;
    };
    for (DraftSource::Ask& row : rows) {
        if (left <= TokenCount(0)) return;
        Book& book = book_of(row);
        if (row.count > TokenCount(0) || plans_ < book.mute_until || book.rival > 1) continue;
        if (row.begins || (step.limit_us && step_us + time_us(row) > *step.limit_us)) continue;
        if (book.trial > 0) {
            ask(row);
        } else if (!step.prompts && book.asked_at <= since &&
                   row.remaining >= TokenCount(2 * kTrialAsks)) {
            since = book.asked_at;
            longest = &row;
        }
    }
    if (longest == nullptr || left <= TokenCount(0)) return;
    const double cost_us = time_us(*longest) + (kTrialAsks - 1) * ask_us;
    if (tried_ && credit_us_ < cost_us) return;
    tried_ = true;
    credit_us_ = 0;
    book_of(*longest).trial = kTrialAsks;
    ask(*longest);
}

// A trial led to nothing.
void Proposer::failed() noexcept {
    share_ = std::max(share_ / 2, kShareMin);
}

}  // namespace tokenspeed::control
