// When a draft model proposes tokens, and what its proposals are worth.
//
// A draft model gives each token that it proposes a probability. How often it is right depends on
// how well it knows the text, so that its word is calibrated: of each proposed token that was put
// to the test, whether it became a draft or not, is learned whether it was right, by how deep in
// the proposal it stood and by the probability it had. A request that has shown little is taken to
// be like the others.
//
// Whether proposing pays is decided a step ahead, before there is a probability, by how often
// tokens so deep were proposed and right, and by how many of the right ones were of use: a draft
// from elsewhere may have been better, or none have been worth its time. Expected tokens over
// predicted time is what every step is to have the most of: with the draft model's passes, and with
// what verifying its tokens costs. A model that reads what it proposes for reads nothing before it
// is asked; then up to a window of it, which what is still to come of the answer must pay for.
//
// Where it does not pay, or drafts from elsewhere are expected to bring more, nothing is asked for.
// To see whether that is still so a request is tried once in a while: it is asked for some steps.
// What trials are expected to cost is a share of all time, which halves with each that led to
// nothing.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "draft_source.h"

namespace tokenspeed::control {

// How often proposed tokens were right.
class ProposalRecord {
  public:
    static constexpr std::size_t kDepths = 8, kClasses = 9;

    // `told`: the probability it had. Of what was noted before, `keep` remains.
    void note(std::size_t depth, float told, bool right, double keep) noexcept;
    // The chance of a token so deep, those before it being right. Mixed with `prior`, which counts
    // as much as `weight` tokens.
    double chance(std::size_t depth, float told, double prior, double weight) const noexcept;
    // The same before its probability is known.
    double chance(std::size_t depth, double prior, double weight) const noexcept;
    // Of so many tokens that were asked for came so many.
    void came(std::size_t count, std::size_t asked, double keep) noexcept;
    // The chance that a token so deep comes, those before it having come.
    double comes(std::size_t depth) const noexcept;
    // Of so many right tokens so many were more than a draft from elsewhere would have brought.
    void earned(double tokens, double right, double keep) noexcept;
    // The first over the second; mixed as above.
    double yield(double prior, double weight) const noexcept;

  private:
    struct Tally {
        double tries = 0, hits = 0;

        void note(bool right, double keep) noexcept;
        double chance(double prior, double weight) const noexcept;
    };
    std::array<std::array<Tally, kClasses>, kDepths> told_;
    std::array<Tally, kDepths> deep_, came_;
    double right_ = 0, earned_ = 0;
};

class Proposer {
  public:
    // `window`: of a request, the most tokens that the draft model reads when it is first asked; 0
    // where it reads along.
    explicit Proposer(TokenCount window) noexcept : window_(window) {}

    // Once per plan: everybody who runs, some of whom got tokens that had been proposed, or others.
    void follow(std::span<const Request* const> running) noexcept;
    // A request at rest, and what was proposed for it, if anything: for each token the chance that
    // it and all before it are right, `most` at most. `rival`: the tokens to be expected of a draft
    // from elsewhere.
    std::vector<float> weigh(const Request& request, const Proposal& proposal, std::size_t most,
                             double rival);
    // So many tokens of its proposal became its draft.
    void drafted(const Request& request, std::size_t tokens) noexcept;
    void ask(std::span<DraftSource::Ask> rows, const DraftSource::Step& step,
             const StepTimeModel& model);
    void ended(RequestId request) noexcept;

  private:
    // Of a request.
    struct Book {
        ProposalRecord record;
        Proposal proposal;          // that it rested with, until it has the tokens to compare
        std::size_t known = 0;      // tokens that it had then
        std::size_t used = 0;       // of these tokens became its draft
        double rival = 0;           // tokens to be expected of a draft from elsewhere
        std::size_t asked = 0;      // tokens; 0 once the answer was seen
        TokenCount read;            // tokens of it that the draft model knows
        std::int64_t seen = 0;      // in which plan it ran last
        std::int32_t trial = 0;     // asks that are left of its trial
        std::int32_t silent = 0;    // asks in a row that brought nothing
        std::int64_t asked_at = 0;  // in which plan
        std::int64_t mute_until = 0;
    };
    using Chances = std::vector<std::vector<float>>;

    struct Prices {
        double value_us;  // of a token: what it takes without proposals
        double round_us;  // of a pass of the draft model
        double token_us;  // of a token that is proposed and verified
        double read_us;   // of a token that the draft model reads first
    };
    std::vector<float> hopes(const Book& book, std::size_t most) const;
    TokenCount unread(const Book& book, const Request& request) const noexcept;
    double gain_us(const std::vector<float>& hopes, const DraftSource::Ask& row,
                   const Prices& prices) const;
    std::vector<std::size_t> counts(const Chances& hopes, const DraftSource::Step& step,
                                    const StepTimeModel& model, const Prices& prices,
                                    double saved_us) const;
    void try_some(std::span<DraftSource::Ask> rows, const DraftSource::Step& step,
                  const Prices& prices, double step_us);
    void failed() noexcept;

    std::unordered_map<std::int64_t, Book> books_;
    ProposalRecord record_;  // of all
    std::int64_t plans_ = 0;
    TokenCount window_;
    bool tried_ = false;
    double share_ = kShareMax;  // of all time, what trials may take
    double credit_us_ = 0;      // of that, what is left

    static constexpr double kShareMax = 0.005, kShareMin = kShareMax / 16;
};

}  // namespace tokenspeed::control
