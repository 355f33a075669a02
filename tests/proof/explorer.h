// Every order of events of a small configuration, each state visited once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "world.h"

namespace tokenspeed::proof {

struct Configuration {
    std::string name;
    control::Config config;
    std::vector<Script> scripts;  // each submitted once, at any time
    int aborts_max;               // requests that may be aborted, each at any time
    bool flushes;
    bool fails;                  // transfers may fail
    std::uint8_t guesses = 0;    // tokens of a draft, of which any number may be right
    std::uint8_t proposals = 0;  // tokens that a draft model is asked for, as many of them right
};

struct Event {
    enum Kind : std::uint8_t {
        kSubmit,
        kAbort,
        kLaunch,
        kCommit,
        kFlush,
        kArrive,
        kFail,
        kGuess,
        kPropose
    };
    Kind kind;
    // Of kSubmit, kAbort, kArrive and kFail; of kGuess, a launch with drafts, and of kPropose, one
    // that brings proposals, how many of their tokens are right.
    std::uint8_t request;
};

std::string text(const std::vector<Event>& trail);

struct Explored {
    std::int64_t states = 0;
    std::int64_t transitions = 0;
    std::int64_t events = 0;        // replayed to reach them
    std::int64_t depth = 0;         // events to the farthest state
    std::int64_t drain_events = 0;  // the most that any state needs to come to rest
};

// Throws Wrong, with the shortest trail of events that leads to what is wrong.
Explored explore(const Configuration& configuration);

std::vector<Configuration> configurations();

}  // namespace tokenspeed::proof
