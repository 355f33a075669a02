#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <numeric>

#include "errors.h"

namespace tokenspeed::cpu {

namespace {

// The greatest of so many logits stands for them where the k-th likeliest token is looked for.
constexpr std::int64_t peak_block = 64;
// Weights are told apart by exponent and four bits of mantissa before any are sorted.
constexpr int bins = 1 << 12;

int bin_of(float weight) {
    return static_cast<int>(std::bit_cast<std::uint32_t>(weight) >> 19);
}

float capped(float logit) {
    if (std::isnan(logit)) return -INFINITY;
    return std::min(logit, FLT_MAX);
}

// One row in the making: what its tokens weigh, and which are still possible.
class Row {
  public:
    // Memory of `count` numbers each.
    struct Memory {
        float* weights;
        float* spare;
        std::int32_t* ids;
    };

    Row(const Kernels& kernels, const float* logits, std::int64_t count, const Memory& memory)
        : kernels_(kernels), logits_(logits), count_(count), memory_(memory) {}

    std::int64_t draw(double uniform, double temperature, std::int64_t top_k, double top_p,
                      double min_p) {
        const std::int64_t likeliest = kernels_.argmax(logits_, count_);
        const float peak = capped(logits_[likeliest]);
        if (peak == -INFINITY) return 0;
        if (top_k == 1) return likeliest;
        kernels_.weigh_logits(logits_, count_, peak,
                              std::max(static_cast<float>(temperature), FLT_MIN), memory_.weights);
        if (top_k < count_) keep_likeliest(top_k);
        if (min_p > 0.0) {
            for_each([&](float& weight, std::int64_t) {
                if (weight < min_p) weight = 0.0f;
            });
        }
        if (top_p < 1.0) keep_nucleus(top_p);
        return at_share(uniform);
    }

  private:
    // Calls f(weight, token) for the tokens that may be left, in the order of their ids.
    template <class F>
    void for_each(const F& f) {
        if (all_) {
            for (std::int64_t id = 0; id < count_; ++id) f(memory_.weights[id], id);
        } else {
            for (std::int64_t at = 0; at < kept_; ++at) {
                f(memory_.weights[memory_.ids[at]], memory_.ids[at]);
            }
        }
    }

    // At least k tokens reach the k-th greatest of the blocks' greatest, so no other token can be
    // among the k likeliest.
    void keep_likeliest(std::int64_t k) {
        std::int64_t peaks = 0;
        if (count_ / peak_block >= k) {
            for (std::int64_t first = 0; first + peak_block <= count_; first += peak_block) {
                float most = -INFINITY;
                for (std::int64_t id = first; id < first + peak_block; ++id) {
                    most = std::max(most, capped(logits_[id]));
                }
                memory_.spare[peaks++] = most;
            }
        } else {
            for (; peaks < count_; ++peaks) memory_.spare[peaks] = capped(logits_[peaks]);
        }
        std::nth_element(memory_.spare, memory_.spare + (k - 1), memory_.spare + peaks,
                         std::greater<>());
        const float bound = memory_.spare[k - 1];
        all_ = false;
        for (std::int64_t id = 0; id < count_; ++id) {
            if (capped(logits_[id]) >= bound) memory_.ids[kept_++] = static_cast<std::int32_t>(id);
        }
        if (kept_ <= k) return;
        const auto likelier = [&](std::int32_t a, std::int32_t b) {
            const float first = capped(logits_[a]), second = capped(logits_[b]);
            return first != second ? first > second : a < b;
        };
        std::nth_element(memory_.ids, memory_.ids + k, memory_.ids + kept_, likelier);
        kept_ = k;
        std::sort(memory_.ids, memory_.ids + kept_);
    }

    // Leaves the fewest tokens, the likeliest first, whose weights reach `share` of all.
    void keep_nucleus(double share) {
        double masses[bins] = {};
        for_each([&](float weight, std::int64_t) { masses[bin_of(weight)] += weight; });
        const double needed = share * std::accumulate(masses, masses + bins, 0.0);
        int last = bins - 1;
        double mass = 0.0;
        while (last > 0 && mass + masses[last] < needed) mass += masses[last--];
        // Within the last bin tokens are sorted.
        std::int32_t* const ids =
            all_ ? memory_.ids : reinterpret_cast<std::int32_t*>(memory_.spare);
        std::int64_t found = 0;
        for_each([&](float& weight, std::int64_t id) {
            const int bin = bin_of(weight);
            if (bin == last) ids[found++] = static_cast<std::int32_t>(id);
            if (bin < last) weight = 0.0f;
        });
        std::sort(ids, ids + found, [&](std::int32_t a, std::int32_t b) {
            const float first = memory_.weights[a], second = memory_.weights[b];
            return first != second ? first > second : a < b;
        });
        std::int64_t at = 0;
        while (at < found && mass < needed) mass += memory_.weights[ids[at++]];
        for (; at < found; ++at) memory_.weights[ids[at]] = 0.0f;
    }

    // The first token at which the running sum of weights exceeds a share of the whole.
    std::int64_t at_share(double share) {
        double total = 0.0;
        std::int64_t last = 0;
        for_each([&](float weight, std::int64_t id) {
            total += weight;
            if (weight > 0.0f) last = id;
        });
        const double target = share * total;
        double sum = 0.0;
        std::int64_t chosen = -1;
        for_each([&](float weight, std::int64_t id) {
            sum += weight;
            if (chosen < 0 && sum > target) chosen = id;
        });
        return chosen < 0 ? last : chosen;
    }

    const Kernels& kernels_;
    const float* logits_;
    std::int64_t count_;
    Memory memory_;
    bool all_ = true;
    std::int64_t kept_ = 0;
};

void check(const In& logits) {
    if (logits.type != Element::f32) throw KernelError("logits must be float32");
}

}  // namespace

void argmax(Runtime& runtime, const In& logits, std::int64_t* tokens) {
    check(logits);
    runtime.perform(logits.rows, [&runtime, logits, tokens](std::int64_t rows) {
        runtime.pool().run(static_cast<int>(rows), [&](int row, int) noexcept {
            tokens[row] =
                runtime.kernels().argmax(static_cast<const float*>(logits.at(row)), logits.columns);
        });
    });
}

void draw(Runtime& runtime, const Draw& call) {
    check(call.logits);
    const auto count = static_cast<std::size_t>(call.logits.columns);
    const auto lease = runtime.lease();
    const auto threads = static_cast<std::size_t>(runtime.pool().threads());
    std::byte* const memory = lease.memory(threads * count * (2 * sizeof(float) + sizeof(int)));
    runtime.pool().run(static_cast<int>(call.logits.rows), [&](int row, int thread) noexcept {
        auto* const weights =
            reinterpret_cast<float*>(memory) + static_cast<std::size_t>(thread) * 3 * count;
        Row one(runtime.kernels(), static_cast<const float*>(call.logits.at(row)),
                call.logits.columns,
                {weights, weights + count, reinterpret_cast<std::int32_t*>(weights + 2 * count)});
        call.tokens[row] = one.draw(call.uniforms[row], call.temperatures[row], call.top_ks[row],
                                    call.top_ps[row], call.min_ps[row]);
    });
}

}  // namespace tokenspeed::cpu
