// Where drafts come from: what the scheduler asks of whoever guesses, and tells them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "ids.h"
#include "proposals.h"
#include "requests.h"
#include "step_time.h"

namespace tokenspeed::control {

// A wrong guess costs time and nothing else, so a source may propose anything. What throws must
// leave the source such that the call can be made again.
class DraftSource {
  public:
    // A decode row of the step in the making, whose request is at rest.
    struct Row {
        const Request* request;
        TokenCount most;                  // tokens that a draft may have
        const Proposal* proposal;         // what the draft model proposed; may be nothing
        std::vector<std::int32_t> draft;  // filled in: guesses of what comes after the last token
        double expected = 1;              // filled in: tokens that the row is expected to give
    };
    // A row of the step whose request may be given proposals by the draft model, once its samples
    // are known.
    struct Ask {
        const Request* request;
        TokenCount most;       // tokens to propose
        TokenCount remaining;  // tokens that are expected to come after these
        bool begins;           // its first token comes of this step
        TokenCount count;      // filled in: how many it shall propose
        TokenCount reads;      // filled in: what the draft model is to read for it first
    };
    struct Step {
        StepWork work;    // all its decode rows
        TokenCount most;  // tokens that all drafts, or proposals, may have together
        bool prompts;     // a prompt would make use of a draft's place
        // That the step may take, as predicted, for each token that the least row is expected to
        // give; no limit where one row is alone.
        std::optional<double> limit_us;
        bool overlaps = false;  // who proposes is left out of a step to come
    };

    virtual ~DraftSource() = default;
    // Once per plan: everybody who runs, to learn from what they know by now.
    virtual void follow(std::span<const Request* const> running) = 0;
    virtual void draft(std::span<Row> rows, const Step& step, const StepTimeModel& model) = 0;
    // Rows whose draft is known: how many tokens the draft model shall propose for each.
    virtual void propose(std::span<Ask> rows, const Step& step, const StepTimeModel& model) = 0;
    // Whether a request in flight is to be left out of this plan, so that it is at rest for a
    // draft.
    virtual bool wants_rest(const Request& request) = 0;
    virtual void ended(RequestId request) noexcept = 0;
    // What the texts take that it keeps.
    virtual std::size_t size_bytes() const noexcept { return 0; }
};

}  // namespace tokenspeed::control
