// Memory runs out in the middle of a call: `faults RUNS [SEED]`. A call either happens or leaves
// everything whole; with memory again it succeeds, and every request gets what it gets alone.

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <random>

#include "explorer.h"
#include "last_words.h"
#include "world.h"

namespace {

// The allocator knows no scheduler: what it counts down can only be its own. 0: none fails.
std::int64_t allocations_left = 0;
std::int64_t allocations_failed = 0;

}  // namespace

void* operator new(std::size_t size) {
    if (allocations_left > 0 && --allocations_left == 0) {
        ++allocations_failed;
        throw std::bad_alloc();
    }
    if (void* found = std::malloc(size)) return found;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept {
    std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
    std::free(memory);
}

namespace tokenspeed::proof {

namespace {

class RandomFaults final : public Faults {
  public:
    explicit RandomFaults(std::uint64_t seed) : random_(seed) {}
    void arm() override {
        allocations_left = std::uniform_int_distribution<std::int64_t>(0, 24)(random_);
    }
    void disarm() override { allocations_left = 0; }
    bool waits() override { return may_wait_ && random_() % 2 == 0; }
    void wait_no_more() { may_wait_ = false; }

  private:
    std::mt19937_64 random_;
    bool may_wait_ = true;
};

void run(const Configuration& configuration, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    RandomFaults faults(seed);
    World world(
        configuration.config,
        {.scribble = true, .audit_every = 1, .own_drafts = seed / 7 % 2 == 0, .faults = &faults});
    const auto count = static_cast<std::int64_t>(configuration.scripts.size());
    for (int event = 0; event < 60; ++event) {
        const auto request = std::uniform_int_distribution<std::int64_t>(0, count - 1)(random);
        switch (std::uniform_int_distribution<int>(0, 11)(random)) {
            case 0:
            case 1:
            case 2:
                // The id of one that ended is free for another, once nothing carries its pages.
                if (world.accepted(request) && !world.live(request) && !world.in_flight() &&
                    world.scheduler().stats().transferring == 0) {
                    world.forget(request);
                }
                if (!world.accepted(request)) {
                    world.submit(request, configuration.scripts[static_cast<std::size_t>(request)]);
                }
                break;
            case 3:
                if (event % 4 == 0) world.abort(request);
                break;
            case 4:
            case 5:
            case 6:
                if (world.in_flight()) world.commit();
                break;
            case 7:
            case 8:
                if (world.travels(request)) {
                    world.transferred(request, !configuration.fails || random() % 3 > 0);
                }
                break;
            case 9:
                if (configuration.flushes) world.flush();
                break;
            default:
                world.launch(
                    [&]() -> std::optional<Guessing> {
                        if (random() % 3 == 0) return std::nullopt;
                        return Guessing{random() % 4, random() % 4};
                    },
                    random() % 3 == 0, random() % 3,
                    [&] { return Device::Insight{random() % 4, random() % 2}; });
                break;
        }
    }
    faults.wait_no_more();
    world.drain(10'000);
}

}  // namespace

}  // namespace tokenspeed::proof

int main(int count, char** arguments) {
    using namespace tokenspeed::proof;
    const std::uint64_t runs = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 2000;
    const std::uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
    print_last_words_on_abort();
    const auto worlds = configurations();
    for (std::uint64_t seed = first; seed < first + runs; ++seed) {
        const Configuration& world = worlds[seed % worlds.size()];
        last_words_begin("faults, seed " + std::to_string(seed) + ", " + world.name);
        try {
            run(world, seed);
        } catch (const std::exception& error) {
            allocations_left = 0;
            std::fprintf(stderr, "WRONG: seed %llu, %s: %s\n",
                         static_cast<unsigned long long>(seed), world.name.c_str(), error.what());
            return 1;
        }
    }
    std::printf("%llu runs, %lld allocations failed\n", static_cast<unsigned long long>(runs),
                static_cast<long long>(allocations_failed));
    return 0;
}
