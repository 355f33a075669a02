// The typed errors of the control plane; the binding turns each into its Python twin.
#pragma once

#include <stdexcept>

namespace tokenspeed::control {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct ConfigError : Error {
    using Error::Error;
};
struct InvalidParameter : Error {
    using Error::Error;
};
struct ContextOverflow : Error {
    using Error::Error;
};
// The caller broke the protocol of steps, or the scheduler broke its own invariants.
struct EngineError : Error {
    using Error::Error;
};

}  // namespace tokenspeed::control
