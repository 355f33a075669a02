// What tokens weigh, and which is the likeliest: the passes over whole rows of logits.

#include "math.inl"

namespace tokenspeed::cpu {
namespace {

// The largest logit of a row, the first of equal ones; 0 if none is above minus infinity. NaN
// counts as that, and plus infinity as the greatest finite number.
std::int64_t argmax(const float* logits, std::int64_t count) {
    constexpr std::int64_t block = 1024;
    constexpr float greatest = __FLT_MAX__;
    // Of an operand that is NaN these give the second one.
    const auto cap = [&](float x) { return greatest < x ? greatest : x; };
    // The greatest of each block, then the first block that has the greatest of all.
    float best = -__builtin_inff();
    std::int64_t best_block = 0;
    for (std::int64_t first = 0; first < count; first += block) {
        const std::int64_t size = count - first < block ? count - first : block;
        Floats most = splat(best);
        std::int64_t at = 0;
        for (; at + lanes <= size; at += lanes) {
            most = max(min(splat(greatest), load_floats(logits + first + at)), most);
        }
        float peak = largest(most);
        for (; at < size; ++at) {
            const float one = cap(logits[first + at]);
            peak = one > peak ? one : peak;
        }
        if (peak > best) {
            best = peak;
            best_block = first;
        }
    }
    if (!(best >= -greatest)) return 0;
    for (std::int64_t at = best_block; at < count; ++at) {
        if (cap(logits[at]) == best) return at;
    }
    return 0;
}

// The largest logit of each 64, as `argmax` counts them.
void block_peaks(const float* logits, std::int64_t count, float* peaks) {
    for (std::int64_t first = 0; first < count; first += peak_block) {
        const std::int64_t size = count - first < peak_block ? count - first : peak_block;
        Floats most = splat(-__builtin_inff());
        each_vector(size, [&](std::int64_t at, std::int64_t left) {
            Floats logit = load_part(logits, Element::f32, first + at, left);
            if (left < lanes) logit = keep(logit, 0, static_cast<int>(left), -__builtin_inff());
            most = max(min(splat(__FLT_MAX__), logit), most);
        });
        peaks[first / peak_block] = largest(most);
    }
}

// Minus infinity for tokens whose bit is not set, and the logits of the others.
void mask_logits(const float* logits, const std::int32_t* words, std::int64_t count, float* to) {
    each_vector(count, [&](std::int64_t at, std::int64_t left) {
        const std::uint32_t bits = static_cast<std::uint32_t>(words[at / 32]) >> (at % 32);
        const Floats logit = load_part(logits, Element::f32, at, left);
        store_part(keep_bits(logit, bits, -__builtin_inff()), to, Element::f32, at, left);
    });
}

// The sum of e^(logit - peak): of some thousands in float32, and of those in float64.
double sum_weights(const float* logits, std::int64_t count, float peak) {
    constexpr std::int64_t block = 4096;
    const Floats greatest = splat(__FLT_MAX__), highest = splat(peak);
    double total = 0.0;
    for (std::int64_t first = 0; first < count; first += block) {
        const std::int64_t size = count - first < block ? count - first : block;
        Floats sums = splat(0.0f);
        each_vector(size, [&](std::int64_t at, std::int64_t left) {
            const Floats logit = min(greatest, load_part(logits, Element::f32, first + at, left));
            Floats weight = exp2(mul(sub(logit, highest), splat(log2_e)));
            if (left < lanes) weight = keep(weight, 0, static_cast<int>(left), 0.0f);
            sums = add(sums, weight);
        });
        total += static_cast<double>(sum(sums));
    }
    return total;
}

// e^((logit - peak) / temperature); 0 for what is no number.
void weigh_logits(const float* logits, std::int64_t count, float peak, float temperature,
                  float* weights) {
    const Floats highest = splat(peak), divisor = splat(temperature);
    const Floats greatest = splat(__FLT_MAX__);
    each_vector(count, [&](std::int64_t at, std::int64_t lanes_left) {
        // Of an operand that is no number the second one remains.
        const Floats logit = min(greatest, load_part(logits, Element::f32, at, lanes_left));
        const Floats power = mul(div(sub(logit, highest), divisor), splat(log2_e));
        store_part(exp2(power), weights, Element::f32, at, lanes_left);
    });
}

}  // namespace
}  // namespace tokenspeed::cpu
