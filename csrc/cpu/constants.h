// Numbers as types, for loops that the compiler must unroll.
#pragma once

#include <cstdint>

namespace tokenspeed::cpu {

template <int value>
struct Constant {};
template <int... values>
struct Constants {};

template <int count, int... values>
struct CountToHelper : CountToHelper<count - 1, count - 1, values...> {};
template <int... values>
struct CountToHelper<0, values...> {
    using Type = Constants<values...>;
};
template <int count>
using CountTo = typename CountToHelper<count>::Type;

// For functions that builds of several instruction sets see: none is left for the linker to share.
#define TOKENSPEED_INLINE inline __attribute__((always_inline))

namespace {

// Calls f with the constants 0 to count - 1.
template <int count, class F>
TOKENSPEED_INLINE void unroll(const F& f) {
    [&]<int... i>(Constants<i...>)
        __attribute__((always_inline)) { (f(Constant<i>()), ...); }(CountTo<count>());
}

// Calls f with the constant `count`, which is 1 to most.
template <int most, class F>
TOKENSPEED_INLINE void with_count(std::int64_t count, const F& f) {
    unroll<most>([&]<int i>(Constant<i>) __attribute__((always_inline)) {
        if (count == i + 1) f(Constant<i + 1>());
    });
}

}  // namespace

}  // namespace tokenspeed::cpu
