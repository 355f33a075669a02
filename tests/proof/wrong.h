// How the drivers say that the scheduler did something it must not.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tokenspeed::proof {

struct Wrong : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] inline void wrong(const std::string& what) {
    throw Wrong(what);
}
inline void expect(bool holds, const char* otherwise) {
    if (!holds) [[unlikely]]
        wrong(otherwise);
}
inline std::string text(std::int64_t number) {
    return std::to_string(number);
}

}  // namespace tokenspeed::proof
