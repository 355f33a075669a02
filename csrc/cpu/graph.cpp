#include "graph.h"

#include "errors.h"

namespace tokenspeed::cpu {

void StepGraph::begin() {
    calls_.clear();
    runtime_.record(&calls_);
    recording_ = true;
}

void StepGraph::end() {
    if (!recording_) throw KernelError("nothing is being recorded");
    runtime_.record(nullptr);
    recording_ = false;
}

}  // namespace tokenspeed::cpu
