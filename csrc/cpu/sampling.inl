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
