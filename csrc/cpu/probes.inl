// Microkernels that find out what one thread can do at most.
//
// Independent chains hide the latency of an operation; as many as registers hold.

namespace tokenspeed::cpu {
namespace {

constexpr int chains = registers / 2 > 0 ? registers / 2 : 1;
constexpr int unrolled = 8;
constexpr std::int64_t int8_round = std::int64_t{chains} * unrolled * 16 * 4 * 2;
constexpr std::int64_t bf16_round = std::int64_t{chains} * unrolled * 16 * 2 * 2;
constexpr std::int64_t f32_round = std::int64_t{chains} * unrolled * 16 * 2;

std::uint64_t probe_read(const std::byte* data, std::size_t size_bytes) {
    constexpr int streams = 4;
    constexpr int at_once = 2;
    const std::size_t stream_size = size_bytes / streams;
    Ints sums[streams][at_once];
    for (auto& stream : sums) {
        for (Ints& sum : stream) sum = splat_ints(0);
    }
    for (std::size_t at = 0; at < stream_size; at += at_once * 64) {
        for (int stream = 0; stream < streams; ++stream) {
            for (int i = 0; i < at_once; ++i) {
                const std::byte* from = data + stream * stream_size + at + i * 64;
                sums[stream][i] = bit_xor(sums[stream][i], load_ints(from));
            }
        }
    }
    Ints all = splat_ints(0);
    for (const auto& stream : sums) {
        for (const Ints& sum : stream) all = bit_xor(all, sum);
    }
    return static_cast<std::uint32_t>(first(all));
}

Ints multiply_add(const Bytes& x, const Ints& sum) {
    return dot(sum, x, x);
}
Floats multiply_add(const Halves& x, const Floats& sum) {
    return dot(sum, x, x);
}
Floats multiply_add(const Floats& x, const Floats& sum) {
    return fma(x, x, sum);
}

// Adds products of x with itself to all chains. The compiler is kept from seeing that x stays the
// same, lest it compute parts of a product once for all.
template <class Vector, class Operand>
Vector run_chains(std::int64_t rounds, Vector start, Operand x) {
    Vector sums[chains];
    for (Vector& sum : sums) sum = start;
    for (std::int64_t round = 0; round < rounds; ++round) {
        for (int repeat = 0; repeat < unrolled; ++repeat) {
#pragma GCC unroll 16
            for (int chain = 0; chain < chains; ++chain) {
                sums[chain] = multiply_add(x, sums[chain]);
                veil(x);
            }
        }
    }
    Vector all = sums[0];
    for (const Vector& sum : sums) asm volatile("" ::"m"(sum));
    return all;
}

std::uint64_t probe_int8(std::int64_t rounds) {
    const std::int8_t four[4] = {1, 2, 3, static_cast<std::int8_t>(rounds)};
    const Bytes x = splat_quad(four);
    const Ints all = run_chains(rounds, splat_ints(0), x);
    return static_cast<std::uint32_t>(first(all));
}

std::uint64_t probe_bf16(std::int64_t rounds) {
    const Halves x = splat_halves(0x3f803f80 ^ static_cast<std::uint32_t>(rounds & 1));
    const Floats all = run_chains(rounds, splat(0.0f), x);
    return static_cast<std::uint64_t>(first(all) != 0.0f);
}

std::uint64_t probe_f32(std::int64_t rounds) {
    const Floats x = splat(rounds & 1 ? 1.5f : 0.5f);
    const Floats all = run_chains(rounds, splat(0.0f), x);
    return static_cast<std::uint64_t>(first(all) != 0.0f);
}

}  // namespace
}  // namespace tokenspeed::cpu
