// Where the scheduler keeps the states: one container for each, by slot or by order.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "states.h"

namespace tokenspeed::control {

// States that hold a slot, by slot.
template <class State>
class Shelf {
  public:
    explicit Shelf(std::int32_t slots) : places_(static_cast<std::size_t>(slots)) {}

    State* at(SlotId slot) noexcept {
        auto& place = places_[static_cast<std::size_t>(slot.value)];
        return place ? &*place : nullptr;
    }
    const State* at(SlotId slot) const noexcept {
        const auto& place = places_[static_cast<std::size_t>(slot.value)];
        return place ? &*place : nullptr;
    }
    State& put(State&& state) noexcept {
        ++count_;
        return places_[static_cast<std::size_t>(state.slot.id().value)].emplace(std::move(state));
    }
    State take(SlotId slot) noexcept {
        auto& place = places_[static_cast<std::size_t>(slot.value)];
        State state = std::move(*place);
        place.reset();
        --count_;
        return state;
    }
    std::size_t count() const noexcept { return count_; }
    template <class Visit>
    void each(Visit&& visit) const {
        for (const auto& place : places_) {
            if (place) visit(*place);
        }
    }

  private:
    std::vector<std::optional<State>> places_;
    std::size_t count_ = 0;
};

// States that hold none, in their order.
template <class State>
class Roster {
  public:
    // Makes room, so that `put` cannot fail. Room that is not used is passed over.
    void reserve(const Order& order) { places_[order]; }
    State& put(State&& state) noexcept {
        ++count_;
        const Order order = state.request->order();
        return places_.find(order)->second.emplace(std::move(state));
    }
    State take(const Order& order) noexcept {
        const auto place = places_.find(order);
        State state = std::move(*place->second);
        places_.erase(place);
        --count_;
        return state;
    }
    const State* at(const Order& order) const noexcept {
        const auto place = places_.find(order);
        return place == places_.end() || !place->second ? nullptr : &*place->second;
    }
    // First and last in order.
    const State* head() const noexcept {
        for (const auto& [order, state] : places_) {
            if (state) return &*state;
        }
        return nullptr;
    }
    const State* last() const noexcept {
        for (auto place = places_.rbegin(); place != places_.rend(); ++place) {
            if (place->second) return &*place->second;
        }
        return nullptr;
    }
    std::size_t count() const noexcept { return count_; }
    template <class Visit>
    void each(Visit&& visit) const {
        for (const auto& [order, state] : places_) {
            if (state) visit(*state);
        }
    }

  private:
    std::map<Order, std::optional<State>> places_;
    std::size_t count_ = 0;
};

}  // namespace tokenspeed::control
