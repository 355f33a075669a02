// The floor: the least tokens a second that whoever decodes is to get.
//
// What is promised: 99 of 100 intervals between two tokens of an admitted user last no longer than
// 1 / floor seconds, and so many times that where so many tokens come together. Where 90% of what
// one user alone would get, as the model of step times has it, is less than the floor, that takes
// its place: a floor that leaves nothing to prompts would let nobody in. Time saved in one step is
// not spent in another: a user who reads along sees the slow step, whatever the mean.
//
// Kept by what a step takes along: no more of the prompts than fits under the limit beside the
// decode rows, and no further user as long as one row more would break it. A step may last as many
// intervals as its decode rows are expected to give tokens, of all the one that is expected to give
// least; so a draft that brings its user more tokens a second is not cut, and one that would hold
// up others is. A user alone has whatever draft brings most tokens a second. So that prompts come
// on even where the decode rows alone fill the limit, one step in 128 takes a page of them all the
// same; it is among the one in a hundred that may be late.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "step_time.h"

namespace tokenspeed::control {

class Floor {
  public:
    // Steps in a row that prompts may be left out of.
    static constexpr std::int32_t kPatience = 128;

    // No floor where there is no rate.
    explicit Floor(std::optional<double> tokens_per_s) noexcept {
        if (tokens_per_s) bound_us_ = 1e6 / *tokens_per_s;
    }

    bool held() const noexcept { return bound_us_.has_value(); }

    // The longest interval that keeps the promise to a user of so long a context, in microseconds.
    double bound_us(const StepTimeModel& model, TokenCount context) const noexcept {
        return std::max(*bound_us_, model.spread() * alone_us(model, context) / kShareOfAlone);
    }
    // The same in predicted times: the average step that keeps 99 of 100 under the bound.
    double limit_us(const StepTimeModel& model, TokenCount context) const noexcept {
        return bound_us(model, context) / model.spread();
    }

    // How much of a prompt a step may take along: `work` is what it runs already, `longest` the
    // longest context among its decode rows, each of which is expected to give `least` tokens or
    // more.
    TokenCount chunk(const StepTimeModel& model, const StepWork& work, TokenCount longest,
                     double least, TokenCount context, TokenCount most,
                     TokenCount page_size) const noexcept {
        if (!held() || work.decode_rows == 0) return most;
        const double limit = least * limit_us(model, longest);
        const TokenCount fits = model.chunk_within(limit, work, context, most);
        if (fits == TokenCount(0) && late_for_ >= kPatience) return std::min(most, page_size);
        return fits;
    }

    // Whether all who would then decode keep the floor: `work` is a step of all their rows.
    bool admits(const StepTimeModel& model, const StepWork& work,
                TokenCount longest) const noexcept {
        if (!held() || work.decode_rows <= 1) return true;
        return model.predict_us(work) <= limit_us(model, longest);
    }

    // A step was launched: whether a prompt waited for its turn, and whether one came on.
    void launched(bool wanted, bool came_on) noexcept {
        late_for_ = wanted && !came_on ? late_for_ + 1 : 0;
    }

  private:
    static double alone_us(const StepTimeModel& model, TokenCount context) noexcept {
        StepWork alone;
        alone.add_decode(context);
        return model.predict_us(alone);
    }

    static constexpr double kShareOfAlone = 0.9;
    std::optional<double> bound_us_;
    std::int32_t late_for_ = 0;  // steps in a row in which no prompt came on though one wanted to
};

}  // namespace tokenspeed::control
