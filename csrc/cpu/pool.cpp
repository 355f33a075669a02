#include "pool.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "errors.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokenspeed::cpu {

namespace {

using Clock = std::chrono::steady_clock;

// The next job of a forward is a few microseconds off, and longer only when it passes through
// Python; a sleeping thread takes some 50 us to come back.
constexpr auto spin_time = std::chrono::microseconds(60);
// Between two looks at the clock lie some 100 ns, unless someone else had the CPU.
constexpr auto preempted_time = std::chrono::microseconds(20);
constexpr int looks_per_clock = 8;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Spins until `done`; false when it took too long, or when the CPU is wanted by others.
template <class Done>
bool spin_until(const Done& done) {
    const auto start = Clock::now();
    auto last = start;
    for (;;) {
        for (int look = 0; look < looks_per_clock; ++look) {
            if (done()) return true;
            pause();
        }
        const auto now = Clock::now();
        if (now - start > spin_time || now - last > preempted_time) return done();
        last = now;
    }
}

std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
        }
    }
#endif
    return cpus;
}

int current_cpu() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return 0;
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads)
    : shares_(threads >= 1 && threads <= threads_max
                  ? static_cast<std::size_t>(threads)
                  : throw ConfigError("threads must be from 1 to " + std::to_string(threads_max) +
                                      ", but is " + std::to_string(threads))) {
    std::vector<int> cpus = allowed_cpus();
    if (cpus.size() >= shares_.size()) {
        cpus.resize(shares_.size());
        cpus_ = std::move(cpus);
    }
    for (int thread = 1; thread < threads; ++thread) {
        workers_.emplace_back([this, thread] { live(thread); });
        if (!cpus_.empty()) pin(thread, cpus_[static_cast<std::size_t>(thread)]);
    }
}

ThreadPool::~ThreadPool() {
    {
        const std::lock_guard lock(sleep_);
        stop_ = true;
        state_.fetch_add(number);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const Job& job) {
    const std::lock_guard one_at_a_time(jobs_);
    const int helpers = threads() - 1;
    if (helpers == 0 || job.chunks <= 1) {
        for (int chunk = 0; chunk < job.chunks; ++chunk) job.call(job.context, chunk, 0);
        return;
    }
    make_way();
    job_ = job;
    for (int thread = 0; thread <= helpers; ++thread) {
        Share& share = shares_[static_cast<std::size_t>(thread)];
        const auto start = [&](int t) {
            return static_cast<int>(std::int64_t{job.chunks} * t / (helpers + 1));
        };
        share.end = start(thread + 1);
        share.next.store(start(thread), std::memory_order_relaxed);
    }
    // Sequentially consistent, like the sleepers' own steps: either a thread about to sleep sees
    // the job, or it is seen to sleep.
    state_.fetch_add(number | open);
    if (sleepers_.load() > 0) {
        {
            const std::lock_guard lock(sleep_);
        }
        wake_.notify_all();
    }
    work(0);
    // Who has not come by now is no longer needed.
    state_.fetch_and(~open);
    wait_for_others();
}

void ThreadPool::work(int thread) {
    for (int offset = 0; offset < threads(); ++offset) {
        Share& share = shares_[static_cast<std::size_t>((thread + offset) % threads())];
        for (;;) {
            if (share.next.load(std::memory_order_relaxed) >= share.end) break;
            const int chunk = share.next.fetch_add(1, std::memory_order_relaxed);
            if (chunk >= share.end) break;
            job_.call(job_.context, chunk, thread);
        }
    }
}

void ThreadPool::live(int thread) {
    std::uint64_t seen = 0;
    for (;;) {
        seen = wait_for_job(seen);
        {
            // Only looked at when there is no job: a stop never comes within one.
            if (!(state_.load() & open)) {
                const std::lock_guard lock(sleep_);
                if (stop_) return;
                continue;
            }
        }
        if (!join(seen)) continue;
        work(thread);
        // The last one out of a job that is closed may have a caller waiting for it.
        const std::uint64_t before = state_.fetch_sub(member);
        if (!(before & open) && (before & members) == member && sleepers_.load() > 0) {
            {
                const std::lock_guard lock(sleep_);
            }
            wake_.notify_all();
        }
    }
}

// Enters the open job; false if it was closed meanwhile. `seen` becomes its number.
bool ThreadPool::join(std::uint64_t& seen) {
    std::uint64_t state = state_.load();
    do {
        seen = state & ~(open | members);
        if (!(state & open)) return false;
    } while (!state_.compare_exchange_weak(state, state + member));
    return true;
}

// Waits for a job of another number than `seen`, and returns its number.
std::uint64_t ThreadPool::wait_for_job(std::uint64_t seen) {
    const auto number_now = [this] { return state_.load() & ~(open | members); };
    if (!spin_until([&] { return number_now() != seen; })) {
        std::unique_lock lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return number_now() != seen; });
        sleepers_.fetch_sub(1);
    }
    return number_now();
}

void ThreadPool::wait_for_others() {
    const auto done = [this] { return (state_.load() & members) == 0; };
    if (spin_until(done)) return;
    std::unique_lock lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, done);
    sleepers_.fetch_sub(1);
}

void ThreadPool::pin(int thread, int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    // Where it is forbidden the thread runs unpinned, which is slower and as right.
    pthread_setaffinity_np(workers_[static_cast<std::size_t>(thread - 1)].native_handle(),
                           sizeof set, &set);
    cpus_[static_cast<std::size_t>(thread)] = cpu;
#else
    (void)thread;
    (void)cpu;
#endif
}

void ThreadPool::make_way() {
    if (cpus_.empty()) return;
    const int here = current_cpu();
    const int left = cpus_[0];
    if (here == left) return;
    const auto worker = std::find(cpus_.begin() + 1, cpus_.end(), here);
    if (worker != cpus_.end()) pin(static_cast<int>(worker - cpus_.begin()), left);
    cpus_[0] = here;
}

}  // namespace tokenspeed::cpu
