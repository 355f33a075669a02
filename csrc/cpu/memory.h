// Memory for weights: zeroed, in huge pages where the system has them, given back all at once.
#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace tokenspeed::cpu {

// Asks for huge pages below memory that someone else took; what it had on small ones stays there.
void prefer_huge_pages(std::span<std::byte> memory);

// Reading weights misses the translation of addresses on every 4 KiB page, which costs half of the
// bandwidth; with pages of 2 MiB hardly ever. Blocks lie one behind the other in large regions, and
// what of a region is never written takes no memory.
class Arena {
  public:
    Arena() = default;
    // Has the system make memory for weights of so many bytes from now on, until the first block is
    // allocated: zeroing it takes longer than packing them. A thread of its own does that.
    explicit Arena(std::size_t size_bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // What was taken so far in this way.
    std::size_t taken_size_bytes() const { return taken_size_bytes_; }
    // Gives back of it what no block has come to need.
    void give_back();

    // A zeroed block, aligned to 64 bytes, that lives as long as the arena. Safe on any thread.
    // Throws std::bad_alloc: the system has no such memory.
    std::span<std::byte> allocate(std::size_t size_bytes);

  private:
    struct Region {
        std::byte* start;
        std::size_t size_bytes;
        std::size_t used_size_bytes;
    };

    std::mutex mutex_;
    std::vector<Region> regions_;
    std::atomic<std::size_t> taken_size_bytes_{0};
    std::jthread taking_;
};

}  // namespace tokenspeed::cpu
