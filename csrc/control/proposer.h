// When a draft model proposes tokens, and what its proposals are worth.
//
// A draft model gives each token that it proposes a probability. How often it is right depends on
// how well it knows the text, so that its word is calibrated: of each proposed token that was put
// to the test, whether it became a draft or not, is learned whether it was right, by how deep in
// the proposal it stood and by the probability it had. A request that has shown little is taken to
// be like the others.
//
// Whether proposing pays is decided a step ahead, before there is a probability, by how often
// tokens so deep were right. Expected tokens over predicted time is what every step is to have the
// most of: with the draft model's passes, and with what verifying its tokens costs. Where it does
// not pay, or drafts from elsewhere are expected to bring more, nothing is asked for, but a token
// once in a while, with gaps that double, to see whether that is still so.
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

  private:
    struct Tally {
        double tries = 0, hits = 0;

        void note(bool right, double keep) noexcept;
        double chance(double prior, double weight) const noexcept;
    };
    std::array<std::array<Tally, kClasses>, kDepths> told_;
    std::array<Tally, kDepths> deep_;
};

class Proposer {
  public:
    // Once per plan: everybody who runs, some of whom got tokens that had been proposed, or others.
    void follow(std::span<const Request* const> running) noexcept;
    // A request at rest, and what was proposed for it, if anything: for each token the chance that
    // it and all before it are right, `most` at most. `rival`: the tokens to be expected of a draft
    // from elsewhere.
    std::vector<float> weigh(const Request& request, const Proposal& proposal, std::size_t most,
                             double rival);
    void ask(std::span<DraftSource::Ask> rows, const DraftSource::Step& step,
             const StepTimeModel& model);
    void ended(RequestId request) noexcept { books_.erase(request.value); }

  private:
    // Of a request.
    struct Book {
        ProposalRecord record;
        Proposal proposal;      // that it rested with, until it has the tokens to compare
        std::size_t known = 0;  // tokens that it had then
        double rival = 0;
        bool asked = false;         // and no answer was seen yet
        std::int32_t silent = 0;    // asks in a row that brought nothing
        std::int64_t asked_at = 0;  // in which plan
        std::int64_t mute_until = 0;
    };
    using Chances = std::vector<std::vector<float>>;

    std::vector<float> hopes(const Book& book, std::size_t most) const;
    std::vector<std::size_t> counts(const Chances& hopes, const DraftSource::Step& step,
                                    const StepTimeModel& model) const;
    void explore(std::span<DraftSource::Ask> rows, const DraftSource::Step& step,
                 const StepTimeModel& model);

    std::unordered_map<std::int64_t, Book> books_;
    ProposalRecord record_;  // of all
    std::int64_t plans_ = 0;
    std::int64_t idle_ = 0;  // plans in a row in which nothing was asked for
    std::int64_t patience_ = kPatience;

    // Nothing was worth its time in so many plans: a token is tried, then after twice as many.
    static constexpr std::int64_t kPatience = 256, kPatienceMax = 8192;
};

}  // namespace tokenspeed::control
