// Doubly linked rings threaded through numbers: a member leaves in O(1), nothing is allocated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenspeed::control {

// Each number is in exactly one ring, alone at first. A list is the ring of a number set aside as
// its head: `next(head)` is its front, `previous(head)` its back, and it is empty while the head is
// alone.
class Rings {
  public:
    using Place = std::uint32_t;

    explicit Rings(std::size_t count = 0) { grow(count); }
    // So many more numbers, each alone.
    void grow(std::size_t more) {
        const std::size_t size = links_.size() + more;
        if (size > links_.capacity()) links_.reserve(size + size / 2);
        while (links_.size() < size) {
            const auto place = static_cast<Place>(links_.size());
            links_.push_back({place, place});
        }
    }

    bool alone(Place place) const noexcept { return links_[place].next == place; }
    Place next(Place place) const noexcept { return links_[place].next; }
    Place previous(Place place) const noexcept { return links_[place].previous; }

    // Puts a number that is alone in front of another.
    void insert_before(Place other, Place place) noexcept {
        const Place before = links_[other].previous;
        links_[place] = {before, other};
        links_[before].next = place;
        links_[other].previous = place;
    }
    void remove(Place place) noexcept {
        const Link link = links_[place];
        links_[link.previous].next = link.next;
        links_[link.next].previous = link.previous;
        links_[place] = {place, place};
    }

  private:
    struct Link {
        Place previous, next;
    };
    std::vector<Link> links_;
};

}  // namespace tokenspeed::control
