// Mixtures of experts: which networks a token goes to, and what they give.
//
// What they throw is KernelError: operands of shapes or types that do not fit each other.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels.h"
#include "packed.h"
#include "runtime.h"

namespace tokenspeed::cpu {

enum class Scoring : std::uint8_t { softmax, sigmoid, chosen };

// The experts of each row of logits, the best first, and their weights; of equal scores the expert
// with the lower number comes first.
struct Routing {
    In logits;          // [tokens, experts]
    const float* bias;  // added to scores where experts are compared; null for none
    Scoring scoring;
    bool normalise;
    float scale;
    // Experts come in equal groups, of which so many are looked at.
    std::int64_t groups, groups_kept;
    std::int64_t count;    // chosen experts of a token
    std::int64_t* chosen;  // [tokens, count]
    float* weights;        // [tokens, count]
};

void route(Runtime& runtime, const Routing& call);

// A matrix of each expert; each is cut into parts of consecutive outputs.
using ExpertMatrices = std::vector<std::vector<const PackedMatrix*>>;

// y = the sum over each token's experts of weight * down(gate(x) * up(x)), in float32 and in the
// order of experts, rounded once. Experts that are not held add nothing.
struct Experts {
    In x;
    ExpertMatrices gate_up;  // gates, and ups below them
    ExpertMatrices down;
    const void* gate_up_bias;  // of x's type, one after the other by expert; null for none
    const void* down_bias;
    std::span<const std::int64_t> chosen;  // [tokens, count]
    std::span<const float> weights;
    std::int64_t first;  // the number of the first expert that is held
    std::optional<float> limit;
    Out y;
};

void experts(Runtime& runtime, const Experts& call);

}  // namespace tokenspeed::cpu
