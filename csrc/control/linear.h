// A right that is held once: moved on or given back, never copied, conjured or dropped.
#pragma once

#include <cassert>
#include <utility>

namespace tokenspeed::control {

// The number is worth nothing; the object is the right. Whoever may mint one derives from this and
// keeps its constructor private.
template <class IdType>
class [[nodiscard]] Linear {
  public:
    Linear() = delete;
    Linear(const Linear&) = delete;
    Linear& operator=(const Linear&) = delete;

    IdType id() const noexcept {
        assert(held_ && "a right was used after it was handed on");
        return id_;
    }

  protected:
    explicit Linear(IdType id) noexcept : id_(id) {}
    Linear(Linear&& other) noexcept : id_(other.id_), held_(std::exchange(other.held_, false)) {}
    Linear& operator=(Linear&& other) noexcept {
        assert(!held_ && "a right was overwritten instead of returned");
        id_ = other.id_;
        held_ = std::exchange(other.held_, false);
        return *this;
    }
    ~Linear() { assert(!held_ && "a right was dropped instead of returned"); }

    // Ends the right; its number may be minted anew.
    IdType melt() noexcept {
        const IdType id = this->id();
        held_ = false;
        return id;
    }

  private:
    IdType id_;
    bool held_ = true;
};

}  // namespace tokenspeed::control
