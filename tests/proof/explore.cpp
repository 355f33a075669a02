// Explores the small worlds: `explore brief|quick|full|NAME [THREADS]`, NAME being
// how the names of some worlds begin, where quick allows one
// abort at most in each, and brief none, nor flushes, with one step in flight beside another. Each
// thread has schedulers of its own, as several engines of one process have.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#include "explorer.h"
#include "last_words.h"
#include "witness.h"
#include "wrong.h"

using namespace tokenspeed::proof;

int main(int count, char** arguments) {
    const std::string_view set = count > 1 ? arguments[1] : "quick";
    const int threads = count > 2 ? std::atoi(arguments[2]) : 1;
    print_last_words_on_abort();

    std::vector<Configuration> chosen;
    for (Configuration& configuration : configurations()) {
        const bool quick = set == "quick", brief = set == "brief";
        if (quick) configuration.aborts_max = std::min(configuration.aborts_max, 1);
        if (brief) {
            if (configuration.config.overlap_depth != 1) continue;
            configuration.aborts_max = 0;
            configuration.flushes = false;
        }
        if (quick || brief || set == "full" || configuration.name.starts_with(set)) {
            chosen.push_back(std::move(configuration));
        }
    }
    std::atomic<std::size_t> next = 0;
    std::mutex printing;
    Explored total;
    bool failed = chosen.empty();
    const auto work = [&] {
        for (std::size_t i; (i = next++) < chosen.size();) {
            try {
                const auto begin = std::chrono::steady_clock::now();
                const Explored found = explore(chosen[i]);
                const std::chrono::duration<double> spent =
                    std::chrono::steady_clock::now() - begin;
                const std::lock_guard lock(printing);
                std::printf(
                    "%-40s %9lld states %10lld transitions, %3lld deep, at rest within "
                    "%2lld events, %.1f s\n",
                    chosen[i].name.c_str(), static_cast<long long>(found.states),
                    static_cast<long long>(found.transitions), static_cast<long long>(found.depth),
                    static_cast<long long>(found.drain_events), spent.count());
                std::fflush(stdout);
                total.states += found.states;
                total.transitions += found.transitions;
                total.events += found.events;
            } catch (const std::exception& error) {
                const std::lock_guard lock(printing);
                std::fprintf(stderr, "WRONG: %s\n", error.what());
                failed = true;
                next = chosen.size();
            }
        }
    };
    std::vector<std::thread> workers;
    for (int i = 1; i < threads; ++i) workers.emplace_back(work);
    work();
    for (std::thread& worker : workers) worker.join();
    if (failed) return 1;
    std::string covered;
    if (watching()) {
        // A single world need not reach everything, but nothing may do what is never to be done.
        const Pairs found = pairs();
        covered = std::to_string(found.reached) + " of " + std::to_string(found.legal) +
                  " (event, state) pairs, ";
        const bool all = set == "quick" || set == "full";
        for (const std::string& pair : found.missing) {
            std::fprintf(stderr, "%sno world reaches %s\n", all ? "WRONG: explorer: " : "",
                         pair.c_str());
        }
        for (const std::string& pair : found.wrong) {
            std::fprintf(stderr, "WRONG: explorer: %s has no occasion, but happened\n",
                         pair.c_str());
        }
        if (!found.wrong.empty() || (all && !found.missing.empty())) return 1;
    }
    std::printf("explored %lld states, %lld transitions, %s%lld events in %zu configurations\n",
                static_cast<long long>(total.states), static_cast<long long>(total.transitions),
                covered.c_str(), static_cast<long long>(total.events), chosen.size());
    return 0;
}
