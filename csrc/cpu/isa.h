// Instruction sets: which there are, which this CPU has, which one is used.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "kernels.h"

namespace tokenspeed::cpu {

// One build of the kernels, and whether this CPU can run it.
struct Isa {
    std::string_view name;
    const Kernels& kernels;
    bool (*supported)();
};

// Every build there is, best first; the last one runs anywhere.
std::span<const Isa> isas();

// The forced one, or else the first that the CPU supports.
// Throws ConfigError: no such name, or the CPU lacks it; says which can be had.
const Isa& select_isa(std::optional<std::string_view> forced);

}  // namespace tokenspeed::cpu
