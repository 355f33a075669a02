// Numbers as types, for loops that the compiler must unroll.
#pragma once

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

}  // namespace tokenspeed::cpu
