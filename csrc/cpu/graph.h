// A step as it was recorded: the same kernels on the same memory, run again for another step.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime.h"

namespace tokenspeed::cpu {

// Operands are remembered by address: whoever records keeps their memory, and sees to it that
// nothing but kernels of the runtime touches it between inputs and results. Rows of a step are
// independent of each other, so what was recorded for some rows can be run for fewer.
class StepGraph {
  public:
    explicit StepGraph(Runtime& runtime) : runtime_(runtime) {}
    StepGraph(const StepGraph&) = delete;
    StepGraph& operator=(const StepGraph&) = delete;

    // Kernels called on the runtime between these two are recorded, and run too.
    // Throws KernelError: nothing is being recorded.
    void begin();
    void end();

    // Runs what was recorded, for the first `rows` rows.
    void run(std::int64_t rows) const {
        for (const Call& call : calls_) call(rows);
    }
    std::size_t size() const { return calls_.size(); }

  private:
    Runtime& runtime_;
    std::vector<Call> calls_;
    bool recording_ = false;
};

}  // namespace tokenspeed::cpu
