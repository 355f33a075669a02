#include "logits.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

namespace tokenspeed::cpu {

namespace {

// Weights are told apart by exponent and four bits of mantissa before any are sorted.
constexpr int bins = 1 << 12;

int bin_of(float weight) {
    return static_cast<int>(std::bit_cast<std::uint32_t>(weight) >> 19);
}

// Whether the first of two tokens is the likelier.
struct Likelier {
    const float* logits;

    bool operator()(std::int32_t a, std::int32_t b) const {
        const float first = capped(logits[a]), second = capped(logits[b]);
        return first != second ? first > second : a < b;
    }
};

// One draw in the making: what its tokens weigh, and which are still possible.
class Drawing {
  public:
    Drawing(const Kernels& kernels, const float* logits, std::int64_t count,
            const RowMemory& memory)
        : kernels_(kernels), logits_(logits), count_(count), memory_(memory) {}

    std::int64_t draw(std::int64_t likeliest, const DrawSettings& settings) {
        const float peak = capped(logits_[likeliest]);
        if (peak == -INFINITY || settings.top_k == 1) return likeliest;
        weigh(peak, std::max(static_cast<float>(settings.temperature), FLT_MIN), settings.top_k);
        if (settings.min_p > 0.0) {
            for_each([&](float& weight, std::int64_t) {
                if (weight < settings.min_p) weight = 0.0f;
            });
        }
        if (settings.top_p < 1.0) keep_nucleus(settings.top_p);
        return at_share(settings.uniform);
    }

  private:
    // Of the likeliest tokens only, where some are left out.
    void weigh(float peak, float temperature, std::int64_t top_k) {
        if (top_k >= count_) {
            kernels_.weigh_logits(logits_, count_, peak, temperature, memory_.weights);
            return;
        }
        all_ = false;
        kept_ = keep_likeliest(kernels_, logits_, count_, top_k, memory_);
        std::sort(memory_.ids, memory_.ids + kept_);
        for (std::int64_t at = 0; at < kept_; ++at) {
            memory_.spare[at] = logits_[memory_.ids[at]];
        }
        kernels_.weigh_logits(memory_.spare, kept_, peak, temperature, memory_.spare);
        for (std::int64_t at = 0; at < kept_; ++at) {
            memory_.weights[memory_.ids[at]] = memory_.spare[at];
        }
    }

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

    // The first token at which the running sum of weights exceeds a share of the whole. Of all
    // tokens sums of blocks are taken first, in eight parts each, which do not wait for each other.
    std::int64_t at_share_of_all(double share) {
        constexpr std::int64_t parts = 8;
        const std::int64_t blocks = (count_ + peak_block - 1) / peak_block;
        auto* const sums = reinterpret_cast<double*>(memory_.spare);
        double total = 0.0;
        for (std::int64_t block = 0; block < blocks; ++block) {
            const float* const weights = memory_.weights + block * peak_block;
            const std::int64_t size = std::min(peak_block, count_ - block * peak_block);
            double part[parts] = {};
            std::int64_t at = 0;
            for (; at + parts <= size; at += parts) {
                for (std::int64_t i = 0; i < parts; ++i) part[i] += weights[at + i];
            }
            for (; at < size; ++at) part[0] += weights[at];
            sums[block] = std::accumulate(part, part + parts, 0.0);
            total += sums[block];
        }
        const double target = share * total;
        double sum = 0.0;
        std::int64_t block = 0;
        while (block + 1 < blocks && sum + sums[block] <= target) sum += sums[block++];
        std::int64_t id = std::min(count_, (block + 1) * peak_block) - 1;
        for (std::int64_t at = block * peak_block; at <= id; ++at) {
            sum += memory_.weights[at];
            if (sum > target) return at;
        }
        // Rounding may put the target on the sum of what is there; who reaches that is meant.
        while (id > 0 && memory_.weights[id] == 0.0f) --id;
        return id;
    }

    // The same of the tokens that are left.
    std::int64_t at_share(double share) {
        if (all_) return at_share_of_all(share);
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
    const RowMemory& memory_;
    bool all_ = true;
    std::int64_t kept_ = 0;
};

}  // namespace

float capped(float logit) {
    if (std::isnan(logit)) return -INFINITY;
    return std::min(logit, FLT_MAX);
}

std::int64_t keep_likeliest(const Kernels& kernels, const float* logits, std::int64_t count,
                            std::int64_t k, const RowMemory& memory) {
    if (k >= count) {
        std::iota(memory.ids, memory.ids + count, 0);
        return count;
    }
    if (k == 0) return 0;
    // At least k tokens reach the k-th greatest of the blocks' greatest, so no other token can be
    // among the k likeliest.
    const std::int64_t blocks = (count + peak_block - 1) / peak_block;
    std::int64_t found = 0;
    if (k <= blocks) {
        float* const peaks = memory.weights;
        kernels.block_peaks(logits, count, peaks);
        std::copy(peaks, peaks + blocks, memory.spare);
        std::nth_element(memory.spare, memory.spare + (k - 1), memory.spare + blocks,
                         std::greater<>());
        const float bound = memory.spare[k - 1];
        for (std::int64_t block = 0; block < blocks; ++block) {
            if (peaks[block] < bound) continue;
            const std::int64_t end = std::min(count, (block + 1) * peak_block);
            for (std::int64_t id = block * peak_block; id < end; ++id) {
                if (capped(logits[id]) >= bound) {
                    memory.ids[found++] = static_cast<std::int32_t>(id);
                }
            }
        }
    } else {
        found = count;
        std::iota(memory.ids, memory.ids + count, 0);
    }
    if (found <= k) return found;
    std::nth_element(memory.ids, memory.ids + k, memory.ids + found, Likelier{logits});
    return k;
}

std::int64_t draw_token(const Kernels& kernels, const float* logits, std::int64_t count,
                        std::int64_t likeliest, const DrawSettings& settings,
                        const RowMemory& memory) {
    return Drawing(kernels, logits, count, memory).draw(likeliest, settings);
}

float Softmax::log_probability(float logit) const {
    return static_cast<float>(std::max(capped(logit) - peak - log_mass, double{-FLT_MAX}));
}

Softmax softmax_of(const Kernels& kernels, const float* logits, std::int64_t count) {
    const float peak = std::max(capped(logits[kernels.argmax(logits, count)]), -FLT_MAX);
    // A row without a possible token has no mass, and its logarithm must still be a number.
    const double mass = std::max(kernels.sum_weights(logits, count, peak),
                                 std::numeric_limits<double>::denorm_min());
    return {peak, std::log(mass)};
}

template <class Id>
void report_likeliest(const Kernels& kernels, const float* logits, std::int64_t count,
                      std::int64_t k, const Softmax& softmax, const RowMemory& memory, Id* ids,
                      float* values) {
    const std::int64_t kept = keep_likeliest(kernels, logits, count, k, memory);
    std::sort(memory.ids, memory.ids + kept, Likelier{logits});
    for (std::int64_t at = 0; at < kept; ++at) {
        ids[at] = memory.ids[at];
        values[at] = softmax.log_probability(logits[memory.ids[at]]);
    }
}
template void report_likeliest(const Kernels&, const float*, std::int64_t, std::int64_t,
                               const Softmax&, const RowMemory&, std::int32_t*, float*);
template void report_likeliest(const Kernels&, const float*, std::int64_t, std::int64_t,
                               const Softmax&, const RowMemory&, std::int64_t*, float*);

void add_bias(float* logits, const Biases& biases) {
    for (std::size_t at = 0; at < biases.ids.size(); ++at) {
        logits[biases.ids[at]] += biases.values[at];
    }
}

float Penalties::apply(float logit, std::int32_t output_count) const {
    const float kept = logit > 0.0f ? logit / repetition : logit * repetition;
    return kept - (frequency * static_cast<float>(output_count) +
                   presence * static_cast<float>(output_count > 0));
}

}  // namespace tokenspeed::cpu
