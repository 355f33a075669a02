#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <stop_token>
#include <thread>

namespace tokenspeed::cpu {

namespace {

constexpr std::size_t small_page = 4096;
constexpr std::size_t huge_page = std::size_t{2} << 20;
constexpr std::size_t region_size = std::size_t{256} << 20;

std::size_t round_up(std::size_t size, std::size_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}

std::byte* reserve(std::size_t size_bytes) {
    const std::size_t mapped = size_bytes + huge_page;
    void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    // The kernel places a mapping at any page: cut off what lies around the aligned part.
    auto* const first = static_cast<std::byte*>(start);
    const auto address = reinterpret_cast<std::uintptr_t>(first);
    const std::size_t before = round_up(address, huge_page) - address;
    if (before > 0) munmap(first, before);
    if (huge_page > before) munmap(first + before + size_bytes, huge_page - before);
    prefer_huge_pages({first + before, size_bytes});
    return first + before;
}

}  // namespace

void prefer_huge_pages(std::span<std::byte> memory) {
#if defined(MADV_HUGEPAGE)
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    const std::size_t before = round_up(address, small_page) - address;
    if (memory.size() <= before) return;
    // A system without huge pages refuses; small ones are slower and as right.
    madvise(memory.data() + before, memory.size() - before, MADV_HUGEPAGE);
#else
    (void)memory;
#endif
}

Arena::Arena(std::size_t size_bytes) {
    const std::size_t wanted = round_up(size_bytes, huge_page);
    // No format grows by more when it is packed, and what is never written takes no memory.
    const std::size_t room = round_up(wanted + wanted / 16 + huge_page, huge_page);
    regions_.push_back({reserve(room), room, 0});
    taking_ = std::jthread([this, wanted, start = regions_.front().start](std::stop_token stop) {
        // madvise(MADV_POPULATE_WRITE) would be for this, but while it runs nobody else can map
        // memory, and a process that imports modules does little else. Small pages are touched
        // where there are no huge ones.
        for (std::size_t at = 0; at < wanted && !stop.stop_requested(); at += small_page) {
            *static_cast<volatile std::byte*>(start + at) = std::byte{0};
            taken_size_bytes_ = at + small_page;
        }
    });
}

void Arena::give_back() {
    const std::lock_guard lock(mutex_);
    taking_ = {};
    if (regions_.empty()) return;
    const Region& region = regions_.front();
    const std::size_t used = round_up(region.used_size_bytes, huge_page);
    if (used >= taken_size_bytes_) return;
    madvise(region.start + used, taken_size_bytes_ - used, MADV_DONTNEED);
    taken_size_bytes_ = used;
}

Arena::~Arena() {
    taking_ = {};
    for (const Region& region : regions_) munmap(region.start, region.size_bytes);
}

std::span<std::byte> Arena::allocate(std::size_t size_bytes) {
    const std::size_t taken = round_up(std::max<std::size_t>(size_bytes, 1), 64);
    const std::lock_guard lock(mutex_);
    // Those who write blocks take the rest as they come to it, on all threads.
    taking_ = {};
    if (regions_.empty() || regions_.back().size_bytes - regions_.back().used_size_bytes < taken) {
        const std::size_t size = round_up(std::max(taken, region_size), huge_page);
        regions_.reserve(regions_.size() + 1);
        regions_.push_back({reserve(size), size, 0});
    }
    Region& region = regions_.back();
    std::byte* const block = region.start + region.used_size_bytes;
    region.used_size_bytes += taken;
    return {block, size_bytes};
}

}  // namespace tokenspeed::cpu
