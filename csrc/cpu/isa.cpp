#include "isa.h"

#include <algorithm>
#include <array>

#include "errors.h"

namespace tokenspeed::cpu {

namespace {

bool always() {
    return true;
}

#if defined(__x86_64__)
// The compiler's own test, which also asks whether the operating system saves the registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
bool has_avx2_vnni() {
    return has_avx2() && __builtin_cpu_supports("avxvnni");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() {
    return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
}

constexpr std::array<Isa, 6> ladder{{
    {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
    {"avx512_vnni", kernels_avx512_vnni, has_avx512_vnni},
    {"avx512", kernels_avx512, has_avx512},
    {"avx2_vnni", kernels_avx2_vnni, has_avx2_vnni},
    {"avx2", kernels_avx2, has_avx2},
    {"scalar", kernels_scalar, always},
}};
#else
constexpr std::array<Isa, 1> ladder{{{"scalar", kernels_scalar, always}}};
#endif

std::string names(bool supported_only) {
    std::string joined;
    for (const Isa& isa : ladder) {
        if (supported_only && !isa.supported()) continue;
        if (!joined.empty()) joined += ", ";
        joined += isa.name;
    }
    return joined;
}

}  // namespace

std::span<const Isa> isas() {
    return ladder;
}

const Isa& select_isa(std::optional<std::string_view> forced) {
    if (!forced)
        return *std::ranges::find_if(ladder, [](const Isa& isa) { return isa.supported(); });
    const auto* found = std::ranges::find(ladder, *forced, &Isa::name);
    if (found == ladder.end()) {
        throw ConfigError("TOKENSPEED_CPU_ISA is '" + std::string(*forced) +
                          "', which is no instruction set known here; the choices are " +
                          names(false));
    }
    if (!found->supported()) {
        throw ConfigError("TOKENSPEED_CPU_ISA is '" + std::string(*forced) +
                          "', which this CPU lacks; it has " + names(true));
    }
    return *found;
}

}  // namespace tokenspeed::cpu
