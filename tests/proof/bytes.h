// Values read off the bytes of a fuzzer's input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace tokenspeed::proof {

using Int32 = std::numeric_limits<std::int32_t>;
using Int64 = std::numeric_limits<std::int64_t>;

// Past the end of the bytes every value is 0.
class Bytes {
  public:
    explicit Bytes(std::span<const std::uint8_t> data) : data_(data) {}

    bool empty() const { return data_.empty(); }
    std::uint8_t byte() {
        if (data_.empty()) return 0;
        const std::uint8_t first = data_.front();
        data_ = data_.subspan(1);
        return first;
    }
    std::int32_t below(std::int32_t bound) { return byte() % bound; }

    // Mostly a small number, sometimes the worst there is.
    std::int64_t number() {
        const std::uint8_t first = byte();
        switch (first) {
            case 255:
                return -1;
            case 254:
                return Int32::max();
            case 253:
                return Int64::max();
            case 252:
                return Int64::min();
            case 251:
                return Int32::min();
            default:
                return first % 40;
        }
    }
    std::int32_t token() {
        const std::uint8_t first = byte();
        if (first == 255) return -1;
        if (first == 254) return Int32::min();
        if (first == 253) return Int32::max();
        return first % 5;
    }
    std::vector<std::int32_t> tokens(std::int32_t longest) {
        std::vector<std::int32_t> found(static_cast<std::size_t>(below(longest + 1)));
        for (std::int32_t& token : found) token = this->token();
        return found;
    }

  private:
    std::span<const std::uint8_t> data_;
};

}  // namespace tokenspeed::proof
