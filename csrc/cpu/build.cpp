// One instruction set's build of the kernels. CMake compiles this file once for each, with the
// flags of that set, TOKENSPEED_TABLE naming its table, and TOKENSPEED_SIMD its primitives.
//
// Whatever the algorithms below use lies in unnamed namespaces: an inline function with a name
// the linker can see would be kept once for all builds, perhaps with instructions that the CPU at
// hand lacks. For the same reason they use no templates of the standard library.
#include "constants.h"
#include "kernels.h"
#include TOKENSPEED_SIMD
#include "gemm.inl"
#include "probes.inl"

namespace tokenspeed::cpu {

constinit const Kernels TOKENSPEED_TABLE = {
    .probes = {.read = probe_read,
               .int8 = probe_int8,
               .bf16 = probe_bf16,
               .f32 = probe_f32,
               .int8_round = int8_round,
               .bf16_round = bf16_round,
               .f32_round = f32_round},
    .quantise = quantise,
    .multiply = {multiply<0>, multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>,
                 multiply<6>, multiply<7>},
    .panels_at_once = few_panels[0],
    .rows_at_once = rows_max,
    .scratch_size_bytes = unpacked_size_bytes + sums_size_bytes,
};

}  // namespace tokenspeed::cpu
