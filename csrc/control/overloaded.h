// One lambda for each alternative of a variant; a missing one does not compile.
#pragma once

namespace tokenspeed::control {

template <class... F>
struct Overloaded : F... {
    using F::operator()...;
};

template <class... F>
Overloaded(F...) -> Overloaded<F...>;  // clang before 17 deduces nothing for aggregates itself

}  // namespace tokenspeed::control
