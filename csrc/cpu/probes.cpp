#include "probes.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

namespace tokenspeed::cpu {

namespace {

// Long enough for a thread to be woken in, short enough that some repeat is undisturbed.
constexpr double probe_s = 1e-3;
constexpr int probes_per_repeat = 4;
constexpr std::size_t page = 4096;

template <class Work>
double seconds(const Work& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double best_rate(Runtime& runtime, std::uint64_t (*probe)(std::int64_t), std::int64_t round_ops,
                 int repeats) {
    std::atomic<std::uint64_t> sink{0};
    std::int64_t rounds = 1000;
    for (double took = 0.0; took < probe_s; rounds *= 2) {
        took = seconds([&] { sink += probe(rounds); });
    }
    const int threads = runtime.pool().threads();
    double best = 0.0;
    for (int repeat = 0; repeat < repeats * probes_per_repeat; ++repeat) {
        const double took = seconds([&] {
            runtime.pool().run(threads, [&](int, int) noexcept { sink += probe(rounds); });
        });
        best = std::max(best, static_cast<double>(round_ops * rounds * threads) / took);
    }
    return best;
}

}  // namespace

double measure_read_bytes_per_s(Runtime& runtime, std::size_t size_bytes, int repeats) {
    constexpr int chunks_per_thread = 16;
    const int chunks = runtime.pool().threads() * chunks_per_thread;
    const std::size_t chunk = std::max<std::size_t>(1, size_bytes / page / chunks) * page;
    Arena arena;
    const std::span<std::byte> buffer = arena.allocate(chunk * static_cast<std::size_t>(chunks));
    std::atomic<std::uint64_t> sink{0};
    const auto part = [&](int index) {
        return buffer.data() + chunk * static_cast<std::size_t>(index);
    };
    runtime.pool().run(chunks,
                       [&](int index, int) noexcept { std::memset(part(index), index, chunk); });
    double best = 0.0;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const double took = seconds([&] {
            runtime.pool().run(chunks, [&](int index, int) noexcept {
                sink += runtime.kernels().probes.read(part(index), chunk);
            });
        });
        best = std::max(best, static_cast<double>(buffer.size()) / took);
    }
    return best;
}

Peaks measure_peaks(Runtime& runtime, int repeats) {
    const auto& probes = runtime.kernels().probes;
    return {.int8 = best_rate(runtime, probes.int8, probes.int8_round, repeats),
            .bf16 = best_rate(runtime, probes.bf16, probes.bf16_round, repeats),
            .f32 = best_rate(runtime, probes.f32, probes.f32_round, repeats)};
}

}  // namespace tokenspeed::cpu
