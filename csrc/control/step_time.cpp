#include "step_time.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace tokenspeed::control {

namespace {

// A kind of step remembers about a hundred of its kind.
constexpr double kKeep = 0.99;
// How strongly a solution is drawn to the one before, in units of the data's own weight.
constexpr double kInertia = 0.01;
// A time this many times off is taken for a stray (the machine did something else) and counts as
// only so far off, unless as many before it were off the same way: then the machine has changed.
constexpr double kStrayRatio = 2.0;
constexpr std::int32_t kStraysMax = 4;
// The spread is a percentile of time over prediction, by stochastic approximation; 99.5 and not 99,
// so that the few that come while it learns do not use up the one in a hundred.
constexpr double kQuantile = 0.995;
constexpr double kSpreadPace = 0.05;
constexpr double kSpreadMax = 2.0;
// What a draft model's forward pass is taken to cost before one was seen, of a row's step; and a
// token that it reads, of one of a prompt.
constexpr double kFirstRoundShare = 0.125;

}  // namespace

StepTimeModel::Terms StepTimeModel::terms(const StepWork& work) noexcept {
    return {1.0,
            static_cast<double>(work.prefill_tokens),
            static_cast<double>(work.decode_rows),
            static_cast<double>(work.draft_tokens),
            static_cast<double>(work.context_tokens),
            work.prefill_pairs,
            static_cast<double>(work.proposed_tokens),
            static_cast<double>(work.proposal_rounds),
            static_cast<double>(work.caught_up_tokens)};
}

void StepTimeModel::Moments::fade(double keep) noexcept {
    for (Terms& row : squares) {
        for (double& entry : row) entry *= keep;
    }
    for (double& entry : times) entry *= keep;
}

void StepTimeModel::Moments::add(const Terms& x, double weight, double time) noexcept {
    for (std::size_t i = 0; i < kTerms; ++i) {
        for (std::size_t j = 0; j < kTerms; ++j) squares[i][j] += weight * x[i] * x[j];
        times[i] += weight * x[i] * time;
    }
}

double StepTimeModel::predict_us(const StepWork& work) const noexcept {
    const Terms x = terms(work);
    double sum = 0;
    for (std::size_t i = 0; i < kTerms; ++i) sum += cost_us_[i] * x[i];
    // Rows beyond any number seen cannot be told from the constant yet: they are taken to cost no
    // less than prompt tokens do.
    const auto unseen =
        static_cast<double>(std::max(work.decode_rows - rows_seen_, std::int64_t{0}));
    return sum + unseen * std::max(cost_us_[kPrefillToken] - cost_us_[kDecodeRow], 0.0);
}

TokenCount StepTimeModel::chunk_within(double limit_us, const StepWork& work, TokenCount context,
                                       TokenCount most) const noexcept {
    const double room = limit_us - predict_us(work) - cost_us_[kContextToken] * context.value;
    if (room <= 0) return TokenCount(0);
    // The positive root of (pair / 2) c^2 + (token + pair * context) c = room, in the form that
    // does not cancel.
    const double linear = cost_us_[kPrefillToken] + cost_us_[kPair] * context.value;
    const double divisor = linear + std::sqrt(linear * linear + 2 * cost_us_[kPair] * room);
    if (2 * room >= divisor * most.value) return most;
    return TokenCount(static_cast<std::int32_t>(2 * room / divisor));
}

void StepTimeModel::observe(const StepWork& work, std::int64_t took_us) noexcept {
    if (took_us <= 0) return;
    auto time = static_cast<double>(took_us);
    const double predicted = predict_us(work);
    const bool reads = work.caught_up_tokens >= kReadingMin;
    // The first drafts may cost anything, and the first proposals: none of these times is a stray.
    const bool known = (work.draft_tokens == 0 || draft_steps_ >= kTrustedAfter) &&
                       (work.proposed_tokens == 0 || proposal_steps_ >= kTrustedAfter) &&
                       (!reads || reading_steps_ >= kTrustedAfter);
    if (trusted() && predicted > 0 && known) {
        if (work.decode_rows > 0) learn_spread(predicted, time);
        time = calm(predicted, time);
    }
    Moments& kind = kinds_[reads                      ? 5
                           : work.proposed_tokens > 0 ? 4
                           : work.draft_tokens > 0    ? 3
                           : work.prefill_tokens == 0 ? 0
                           : work.decode_rows == 0    ? 1
                                                      : 2];
    kind.fade(kKeep);
    kind.add(terms(work), 1.0 / (time * time), time);
    ++observations_;
    rows_seen_ = std::max(rows_seen_, work.decode_rows);
    drafts_seen_ = std::max(drafts_seen_, work.draft_tokens);
    draft_steps_ += work.draft_tokens > 0 ? 1 : 0;
    proposed_seen_ = std::max(proposed_seen_, work.proposed_tokens);
    proposal_steps_ += work.proposed_tokens > 0 ? 1 : 0;
    reading_steps_ += reads ? 1 : 0;
    solve();
}

double StepTimeModel::draft_token_us(bool prompts) const noexcept {
    return prompts ? std::max(cost_us_[kDraftToken], cost_us_[kPrefillToken])
                   : cost_us_[kDraftToken];
}

double StepTimeModel::calm(double predicted_us, double took_us) noexcept {
    const bool slow = took_us > kStrayRatio * predicted_us;
    const bool fast = took_us * kStrayRatio < predicted_us;
    if (!slow && !fast) {
        strays_ = 0;
        return took_us;
    }
    strays_ = slow ? std::max(strays_, 0) + 1 : std::min(strays_, 0) - 1;
    if (std::abs(strays_) < kStraysMax) {
        return slow ? kStrayRatio * predicted_us : predicted_us / kStrayRatio;
    }
    // What was learned before is of another machine.
    for (Moments& kind : kinds_) kind.fade(0.1);
    strays_ = 0;
    return took_us;
}

// Strays are left out: no smaller step would have spared anybody those.
void StepTimeModel::learn_spread(double predicted_us, double took_us) noexcept {
    if (took_us > kStrayRatio * predicted_us) return;
    const bool over = took_us > spread_ * predicted_us;
    spread_ += kSpreadPace * (over ? kQuantile : kQuantile - 1.0);
    spread_ = std::clamp(spread_, 1.0, kSpreadMax);
}

// Solves the normal equations in terms scaled to unit diagonal, so that inertia weighs all terms
// alike, and without the terms whose coefficient would be negative.
void StepTimeModel::solve() noexcept {
    Moments sum = kinds_[0];
    for (std::size_t k = 1; k < kinds_.size(); ++k) {
        for (std::size_t i = 0; i < kTerms; ++i) {
            for (std::size_t j = 0; j < kTerms; ++j) sum.squares[i][j] += kinds_[k].squares[i][j];
            sum.times[i] += kinds_[k].times[i];
        }
    }
    Terms scale{};
    std::array<bool, kTerms> seen{}, used{};
    for (std::size_t i = 0; i < kTerms; ++i) {
        seen[i] = used[i] = sum.squares[i][i] > 0;
        if (seen[i]) scale[i] = 1.0 / std::sqrt(sum.squares[i][i]);
    }

    Terms solution{};
    for (bool negative = true; negative;) {
        // Cholesky of the terms in use; the others stay at zero.
        std::array<Terms, kTerms> lower{};
        Terms forward{};
        for (std::size_t i = 0; i < kTerms; ++i) {
            if (!used[i]) continue;
            for (std::size_t j = 0; j <= i; ++j) {
                if (!used[j]) continue;
                double entry = sum.squares[i][j] * scale[i] * scale[j] + (i == j ? kInertia : 0.0);
                for (std::size_t k = 0; k < j; ++k) entry -= lower[i][k] * lower[j][k];
                lower[i][j] = i == j ? std::sqrt(std::max(entry, 1e-12)) : entry / lower[j][j];
            }
            double entry = sum.times[i] * scale[i] + kInertia * cost_us_[i] / scale[i];
            for (std::size_t k = 0; k < i; ++k) entry -= lower[i][k] * forward[k];
            forward[i] = entry / lower[i][i];
        }
        solution = {};
        for (std::size_t i = kTerms; i-- > 0;) {
            if (!used[i]) continue;
            double entry = forward[i];
            for (std::size_t k = i + 1; k < kTerms; ++k) entry -= lower[k][i] * solution[k];
            solution[i] = entry / lower[i][i];
        }
        std::size_t worst = 0;
        for (std::size_t i = 1; i < kTerms; ++i) {
            if (solution[i] < solution[worst]) worst = i;
        }
        negative = solution[worst] < 0;
        if (negative) used[worst] = false;
    }
    for (std::size_t i = 0; i < kTerms; ++i) cost_us_[i] = solution[i] * scale[i];

    // A prompt token takes no more than a decode row, and a pair no more than a context token:
    // until one of them was seen, the other stands for it.
    const auto stand_in = [&](Term a, Term b) {
        if (!seen[a]) cost_us_[a] = cost_us_[b];
        if (!seen[b]) cost_us_[b] = cost_us_[a];
    };
    stand_in(kPrefillToken, kDecodeRow);
    stand_in(kContextToken, kPair);
    if (!seen[kDraftToken]) cost_us_[kDraftToken] = cost_us_[kDecodeRow];
    if (!seen[kProposalRound]) {
        cost_us_[kProposalRound] = kFirstRoundShare * (cost_us_[kStep] + cost_us_[kDecodeRow]);
    }
    if (!seen[kCaughtUpToken]) {
        cost_us_[kCaughtUpToken] = kFirstRoundShare * cost_us_[kPrefillToken];
    }
}

}  // namespace tokenspeed::control
