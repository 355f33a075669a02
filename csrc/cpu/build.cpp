// One instruction set's build of the kernels. CMake compiles this file once for each, with the
// flags of that set, TOKENSPEED_TABLE naming its table, and TOKENSPEED_SIMD its primitives.
//
// Whatever the algorithms below use lies in unnamed namespaces: an inline function with a name
// the linker can see would be kept once for all builds, perhaps with instructions that the CPU at
// hand lacks. For the same reason they use no templates of the standard library.
#include "constants.h"
#include "kernels.h"

#include TOKENSPEED_SIMD

#include "attention.inl"
#include "dense.inl"
#include "gemm.inl"
#include "latent.inl"
#include "probes.inl"
#include "quantise.inl"
#include "rowwise.inl"
#include "sampling.inl"

namespace tokenspeed::cpu {

namespace {

constexpr std::size_t larger(std::size_t a, std::size_t b) {
    return a > b ? a : b;
}

}  // namespace

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
                 multiply<6>, multiply<7>, multiply_dense<Element::bf16>,
                 multiply_dense<Element::f32>},
    .add_rms_norm = add_rms_norm,
    .gate = gate,
    .rotate = rotate,
    .argmax = argmax,
    .block_peaks = block_peaks,
    .mask_logits = mask_logits,
    .sum_weights = sum_weights,
    .weigh_logits = weigh_logits,
    .append = append,
    .attend = attend,
    .merge = merge,
    .append_latents = append_latents,
    .attend_latent = attend_latent,
    .merge_latent = merge_latent,
    .latent_rows = latent_rows_max,
    .attention_rows = part_rows_max,
    .streamed_rows_max = streamed_rows_max,
    .streams = few_panels[0],
    .few_rows = few_rows,
    .cut_rows = cut_rows,
    .cut_rows_min = cut_rows_min,
    .cut_rows_max = cut_rows_max,
    .tile_panels = tile_panels,
    .tile_rows = tile_rows,
    .rows_max = rows_max,
    .panels_max = panels_max,
    .scratch_size_bytes = larger(unpacked_size_bytes + sums_size_bytes,
                                 larger(sizeof(AttentionScratch), sizeof(LatentScratch))),
};

}  // namespace tokenspeed::cpu
