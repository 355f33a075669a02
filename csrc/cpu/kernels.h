// What each instruction set's build of the kernels offers: one table of functions a build.
//
// The functions are the inner work of one thread. They take raw pointers that the callers have
// checked, and never fail.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenspeed::cpu {

struct Kernels {
    // Microkernels that do nothing useful, as fast as it goes; `probes.cpp` times them. Each
    // returns a number that depends on all its work, so that none of it can be left out.
    struct Probes {
        // Reads a buffer of a multiple of 4 KiB in four streams.
        std::uint64_t (*read)(const std::byte* data, std::size_t size_bytes);
        // Products of unsigned with signed bytes, bfloat16 products, float32 products: `rounds`
        // rounds of the operations that `*_round` counts (a multiplication and an addition are
        // two).
        std::uint64_t (*int8)(std::int64_t rounds);
        std::uint64_t (*bf16)(std::int64_t rounds);
        std::uint64_t (*f32)(std::int64_t rounds);
        std::int64_t int8_round;
        std::int64_t bf16_round;
        std::int64_t f32_round;
    };

    Probes probes;
};

#if defined(__x86_64__)
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_avx512_vnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2_vnni;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_scalar;

}  // namespace tokenspeed::cpu
