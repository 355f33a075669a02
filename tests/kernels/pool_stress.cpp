// Drives a ThreadPool hard: every chunk of every job must run exactly once, on a thread of which
// no other call is running, and before `run` returns. Built with ThreadSanitizer by test_pool.py.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "pool.h"

using tokenspeed::cpu::ThreadPool;

namespace {

void require(bool holds, const char* what) {
    if (holds) return;
    std::printf("%s\n", what);
    std::exit(1);
}

void one_job(ThreadPool& pool, int chunks) {
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(chunks));
    std::vector<std::atomic<bool>> busy(static_cast<std::size_t>(pool.threads()));
    std::vector<int> plain(static_cast<std::size_t>(chunks));
    pool.run(chunks, [&](int chunk, int thread) noexcept {
        auto& mine = busy[static_cast<std::size_t>(thread)];
        require(!mine.exchange(true), "two calls at once on one thread");
        runs[static_cast<std::size_t>(chunk)].fetch_add(1);
        plain[static_cast<std::size_t>(chunk)] = chunk;  // not atomic: `run` must publish it
        mine.store(false);
    });
    for (int chunk = 0; chunk < chunks; ++chunk) {
        require(runs[static_cast<std::size_t>(chunk)].load() == 1, "a chunk did not run once");
        require(plain[static_cast<std::size_t>(chunk)] == chunk, "a chunk's result is lost");
    }
}

}  // namespace

int main(int, char** arguments) {
    const int jobs = std::atoi(arguments[1]);
    const unsigned seed = static_cast<unsigned>(std::atoi(arguments[2]));
    std::mt19937 random(seed);
    for (const int threads : {1, 2, 3, 5}) {
        ThreadPool pool(threads);
        require(pool.threads() == threads, "the pool has another number of threads");
        for (int job = 0; job < jobs; ++job) {
            // Pauses longer than the spinning time put threads to sleep between jobs.
            if (random() % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
            one_job(pool, static_cast<int>(random() % 20));
        }
        // Two callers take turns.
        std::thread other([&] {
            for (int job = 0; job < jobs; ++job) one_job(pool, 4);
        });
        for (int job = 0; job < jobs; ++job) one_job(pool, 6);
        other.join();
    }
    std::printf("done\n");
    return 0;
}
