// The threads of one engine: they share out the chunks of one job at a time.
//
// A job's chunks are cut by its author alone, never by the number of threads, and a chunk's result
// does not depend on who runs it; so results depend on neither threads nor timing. Each thread
// starts with a share of its own (whose data its caches may still hold) and then helps the others:
// a thread that another process keeps from its CPU holds up the one chunk it has begun, no more.
//
// Idle threads spin for some microseconds, because the next job of a forward pass is near, and then
// sleep. One that notices it was kept from its CPU while spinning sleeps at once.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace tokenspeed::cpu {

class ThreadPool {
  public:
    // The caller of `run` is one of the threads. Where the process may use at least as many CPUs as
    // there are threads, each of the others is pinned to a CPU of its own, since a woken thread
    // often lands on the CPU of the one that woke it. The caller is not ours to pin: where it comes
    // to run on the CPU of a worker, the two change places.
    // Throws ConfigError: fewer than 1 or more than threads_max.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    static constexpr int threads_max = 1024;

    int threads() const { return static_cast<int>(shares_.size()); }

    // Calls work(chunk, thread) once for each chunk of [0, chunks), and returns when all are done.
    // `thread`, in [0, threads()), is held by one call at a time: it can index scratch memory.
    // `work` must not throw, and must not run jobs of the same pool.
    template <class Work>
    void run(int chunks, const Work& work) {
        static_assert(std::is_nothrow_invocable_v<const Work&, int, int>);
        run(Job{[](const void* context, int chunk, int thread) noexcept {
                    (*static_cast<const Work*>(context))(chunk, thread);
                },
                &work, chunks});
    }

  private:
    struct Job {
        void (*call)(const void* context, int chunk, int thread) noexcept;
        const void* context;
        int chunks;
    };
    // A thread's chunks [next, end); others may take from it.
    struct alignas(64) Share {
        std::atomic<int> next{0};
        int end = 0;
    };

    void run(const Job& job);
    void work(int thread);
    void live(int thread);
    bool join(std::uint64_t& seen);
    std::uint64_t wait_for_job(std::uint64_t seen);
    void wait_for_others();
    void pin(int thread, int cpu);
    void make_way();

    // Bit 0: a job is open to be joined. Bits 1-15: how many of the threads are within it. Above:
    // the job's number.
    static constexpr std::uint64_t open = 1, member = 2, members = 0xfffe, number = 0x10000;

    std::mutex jobs_;  // held for as long as a job runs
    Job job_{};
    std::vector<Share> shares_;
    alignas(64) std::atomic<std::uint64_t> state_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
    bool stop_ = false;  // guarded by sleep_ and published by state_
    std::vector<std::thread> workers_;
    // The CPU of each thread, the caller's first; empty if none is pinned. Guarded by jobs_.
    std::vector<int> cpus_;
};

}  // namespace tokenspeed::cpu
