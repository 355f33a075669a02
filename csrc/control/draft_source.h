// Where drafts come from: what the scheduler asks of whoever guesses, and tells them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "ids.h"
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
        std::vector<std::int32_t> draft;  // filled in: guesses of what comes after the last token
    };
    struct Step {
        StepWork work;                   // all its decode rows
        TokenCount most;                 // tokens that all drafts together may have
        bool prompts;                    // a prompt would make use of a draft's place
        std::optional<double> limit_us;  // that the decode rows and drafts may take, as predicted
    };

    virtual ~DraftSource() = default;
    // Once per plan: everybody who runs, to learn from what they know by now.
    virtual void follow(std::span<const Request* const> running) = 0;
    virtual void draft(std::span<Row> rows, const Step& step, const StepTimeModel& model) = 0;
    // Whether a request in flight is to be left out of this plan, so that it is at rest for a
    // draft.
    virtual bool wants_rest(const Request& request) = 0;
    virtual void ended(RequestId request) noexcept = 0;
};

}  // namespace tokenspeed::control
