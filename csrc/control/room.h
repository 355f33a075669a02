// Room made before anything moves, so that what follows cannot fail.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace tokenspeed::control {

// Grows by doubling, so that making room one by one stays O(1) each.
template <class T>
void make_room_for(std::vector<T>& items, std::size_t more) {
    const std::size_t wanted = items.size() + more;
    if (wanted > items.capacity()) items.reserve(std::max(wanted, 2 * items.capacity()));
}

}  // namespace tokenspeed::control
