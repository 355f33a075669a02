// The typed errors of the CPU kernels; the binding turns each into its Python twin.
#pragma once

#include <stdexcept>

namespace tokenspeed::cpu {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// A choice of the user that this machine cannot follow.
struct ConfigError : Error {
    using Error::Error;
};
// Operands that a kernel cannot take.
struct KernelError : Error {
    using Error::Error;
};

}  // namespace tokenspeed::cpu
