// Which (event, state) pairs of the table in events.h have been performed.
//
// The control plane knows nothing of this: it is compiled with -finstrument-functions, and what
// the compiler then calls at every function's entry looks the function up. Without that flag
// nothing is seen, and `watching` says so.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace tokenspeed::proof {

struct Pairs {
    std::size_t legal = 0;             // that have an occasion
    std::size_t reached = 0;           // of those
    std::vector<std::string> missing;  // "Event x State"
    std::vector<std::string> wrong;    // that were performed though they have no occasion
};

bool watching() noexcept;
Pairs pairs();
// An abort of a request that has ended: the scheduler looks no further than its id.
void witness_late_abort() noexcept;

}  // namespace tokenspeed::proof
