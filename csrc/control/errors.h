// The typed errors of the control plane; the binding turns each into its Python twin.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tokenspeed::control {

// A number in the words of an error.
inline std::string text(std::int64_t number) {
    return std::to_string(number);
}

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
