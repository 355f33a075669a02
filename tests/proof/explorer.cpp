#include "explorer.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <span>
#include <unordered_map>

#include "last_words.h"
#include "witness.h"
#include "wrong.h"

namespace tokenspeed::proof {

namespace {

constexpr std::int64_t kStatesMax = 40'000'000;
constexpr std::size_t kScriptsMax = 8;  // from as many answers on lengths are foreseen
constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

struct KeyHash {
    std::size_t operator()(const World::Key& key) const { return key[0]; }
};

// A state is known by the trail that first led to it.
struct State {
    std::uint32_t parent;
    Event event;
    std::uint32_t first_edge;
    std::uint32_t drain_next;  // where the engine's own loop goes from here, kNone at rest
};

class Explorer {
  public:
    explicit Explorer(const Configuration& configuration)
        : configuration_(configuration),
          aborts_scarce_(configuration.aborts_max <
                         static_cast<int>(configuration.scripts.size())) {
        // What the fingerprint leaves out must not matter.
        expect(!configuration.config.tps_floor && !configuration.config.queue_timeout_us &&
                   configuration.scripts.size() < kScriptsMax,
               "explorer: the world knows a floor, deadlines or many requests, which fingerprints "
               "leave out");
    }

    Explored run() {
        try {
            World world(configuration_.config, kChecks);
            arrive(world.key(aborts_scarce_), kNone, {Event::kFlush, 0});
            for (std::uint32_t state = 0; state < states_.size(); ++state) expand(state);
            trail_.clear();
            check_progress();
        } catch (const std::exception& error) {
            throw Wrong(configuration_.name + ": " + error.what() + "\n    after " + text(trail_));
        }
        found_.states = static_cast<std::int64_t>(states_.size());
        found_.transitions = static_cast<std::int64_t>(edges_.size());
        return found_;
    }

  private:
    // Each state is audited once, when an event leads to it.
    static constexpr World::Checks kChecks{.scribble = true,
                                           .audit_every = std::numeric_limits<std::int64_t>::max()};

    void apply(World& world, Event event) {
        last_words(event_text(event));
        switch (event.kind) {
            case Event::kSubmit:
                return world.submit(event.request, configuration_.scripts[event.request]);
            case Event::kAbort:
                if (!world.abort(event.request)) witness_late_abort();
                return;
            case Event::kLaunch:
                launched_ = world.launch();
                return;
            case Event::kCommit:
                return world.commit();
            case Event::kFlush:
                return world.flush();
            case Event::kArrive:
                return world.transferred(event.request, true);
            case Event::kFail:
                return world.transferred(event.request, false);
            case Event::kGuess: {
                const Guessing guessing{configuration_.guesses, event.request};
                launched_ = world.launch([guessing] { return std::optional(guessing); }, true);
                return;
            }
            case Event::kPropose: {
                const Device::Insight insight{event.request, 0};
                launched_ = world.launch(nullptr, false, configuration_.proposals,
                                         [insight] { return insight; });
                return;
            }
        }
    }

    static std::string event_text(Event event) { return text(std::vector<Event>{event}); }

    void replay(World& world) {
        last_words_begin(configuration_.name);
        world.check_events(false);
        for (const Event event : trail_) apply(world, event);
        world.check_events(true);
        found_.events += static_cast<std::int64_t>(trail_.size());
    }

    void trace(std::uint32_t state) {
        trail_.clear();
        for (; states_[state].parent != kNone; state = states_[state].parent) {
            trail_.push_back(states_[state].event);
        }
        std::ranges::reverse(trail_);
    }

    std::vector<Event> enabled(const World& world) const {
        std::vector<Event> events;
        int aborts = 0;
        const auto& scripts = configuration_.scripts;
        for (std::uint8_t request = 0; request < scripts.size(); ++request) {
            if (world.accepted(request)) aborts += world.aborted(request) ? 1 : 0;
        }
        for (std::uint8_t request = 0; request < scripts.size(); ++request) {
            if (!world.accepted(request)) {
                // Requests that ask for the same are interchangeable: the first goes first.
                const bool turn = request == 0 || world.accepted(request - 1) ||
                                  scripts[request].history != scripts[request - 1].history ||
                                  scripts[request].salt != scripts[request - 1].salt ||
                                  scripts[request].priority != scripts[request - 1].priority ||
                                  scripts[request].handover != scripts[request - 1].handover;
                if (turn) events.push_back({Event::kSubmit, request});
            } else if (aborts < configuration_.aborts_max && !world.aborted(request)) {
                events.push_back({Event::kAbort, request});
            }
        }
        for (std::uint8_t request = 0; request < scripts.size(); ++request) {
            if (!world.travels(request)) continue;
            events.push_back({Event::kArrive, request});
            if (configuration_.fails) events.push_back({Event::kFail, request});
        }
        events.push_back({Event::kLaunch, 0});
        if (configuration_.guesses > 0) {
            for (std::uint8_t right = 0; right <= configuration_.guesses; ++right) {
                events.push_back({Event::kGuess, right});
            }
        }
        if (configuration_.proposals > 0) {
            for (std::uint8_t right = 0; right <= configuration_.proposals; ++right) {
                events.push_back({Event::kPropose, right});
            }
        }
        if (world.in_flight()) events.push_back({Event::kCommit, 0});
        if (configuration_.flushes) events.push_back({Event::kFlush, 0});
        return events;
    }

    // The number of the state, new or known.
    std::uint32_t arrive(const World::Key& key, std::uint32_t parent, Event event) {
        const auto [place, fresh] =
            numbers_.try_emplace(key, static_cast<std::uint32_t>(states_.size()));
        if (fresh) {
            if (states_.size() >= kStatesMax) wrong("explorer: the states have no end");
            states_.push_back({parent, event, 0, kNone});
        }
        return place->second;
    }

    void expand(std::uint32_t number) {
        trace(number);
        found_.depth = std::max(found_.depth, static_cast<std::int64_t>(trail_.size()));
        states_[number].first_edge = static_cast<std::uint32_t>(edges_.size());
        std::uint32_t after_launch = kNone, after_commit = kNone, after_arrival = kNone;
        std::optional<World> world;
        const auto go_there = [&] {
            world.emplace(configuration_.config, kChecks);
            replay(*world);
        };
        go_there();
        const auto same = numbers_.find(world->key(aborts_scarce_));
        expect(same != numbers_.end() && same->second == number,
               "explorer: the same calls led to another state");
        const bool idle = world->live_count() == 0 && !world->in_flight() && !world->any_travels();
        const bool full = world->full();
        for (const Event event : enabled(*world)) {
            if (!world) go_there();
            trail_.push_back(event);
            launched_ = false;
            apply(*world, event);
            world->scheduler().audit();
            const std::uint32_t next = arrive(world->key(aborts_scarce_), number, event);
            world.reset();
            trail_.pop_back();
            edges_.push_back(next);
            if (event.kind == Event::kLaunch) after_launch = next;
            if (event.kind == Event::kCommit) after_commit = next;
            if (event.kind == Event::kArrive) after_arrival = next;
            if (launched_) {
                expect(next != number, "explorer: a step was launched and nothing changed");
            }
        }
        // What the engine does when nothing new comes: plan, commit when that gives nothing, and
        // wait for transfers when nothing is in flight.
        const bool plans = !full && after_launch != number;
        if (idle && !plans) {
            go_there();
            return world->check_rest();
        }
        states_[number].drain_next = plans                   ? after_launch
                                     : after_commit != kNone ? after_commit
                                                             : after_arrival;
        expect(states_[number].drain_next != kNone,
               "explorer: requests are live, but nothing can happen");
    }

    // From every state the engine's loop comes to rest, and no endless loop avoids that: but for
    // events that change nothing, the states have no cycle.
    void check_progress() {
        std::vector<std::uint32_t> edges_in(states_.size());
        const auto successors = [&](std::uint32_t state) {
            const std::size_t end =
                state + 1 < states_.size() ? states_[state + 1].first_edge : edges_.size();
            return std::span(edges_).subspan(states_[state].first_edge,
                                             end - states_[state].first_edge);
        };
        for (std::uint32_t state = 0; state < states_.size(); ++state) {
            for (const std::uint32_t next : successors(state)) edges_in[next] += next != state;
        }
        std::vector<std::uint32_t> sorted;
        for (std::uint32_t state = 0; state < states_.size(); ++state) {
            if (edges_in[state] == 0) sorted.push_back(state);
        }
        for (std::size_t i = 0; i < sorted.size(); ++i) {
            for (const std::uint32_t next : successors(sorted[i])) {
                if (next != sorted[i] && --edges_in[next] == 0) sorted.push_back(next);
            }
        }
        if (sorted.size() != states_.size()) {
            const auto state = static_cast<std::uint32_t>(
                std::ranges::find_if(edges_in, [](auto count) { return count > 0; }) -
                edges_in.begin());
            trace(state);
            wrong("explorer: events can go in circles for ever");
        }
        std::vector<std::int64_t> drains(states_.size());
        for (auto state = sorted.rbegin(); state != sorted.rend(); ++state) {
            const std::uint32_t next = states_[*state].drain_next;
            if (next == kNone) continue;
            drains[*state] = drains[next] + 1;
            found_.drain_events = std::max(found_.drain_events, drains[*state]);
        }
    }

    const Configuration& configuration_;
    bool aborts_scarce_;
    std::unordered_map<World::Key, std::uint32_t, KeyHash> numbers_;
    std::vector<State> states_;
    std::vector<std::uint32_t> edges_;
    std::vector<Event> trail_;
    bool launched_ = false;
    Explored found_;
};

}  // namespace

std::string text(const std::vector<Event>& trail) {
    std::string all;
    for (const Event event : trail) {
        if (!all.empty()) all += ", ";
        switch (event.kind) {
            case Event::kSubmit:
                all += "submit " + text(static_cast<std::int64_t>(event.request));
                break;
            case Event::kAbort:
                all += "abort " + text(static_cast<std::int64_t>(event.request));
                break;
            case Event::kLaunch:
                all += "launch";
                break;
            case Event::kCommit:
                all += "commit";
                break;
            case Event::kFlush:
                all += "flush";
                break;
            case Event::kArrive:
                all += "arrive " + text(static_cast<std::int64_t>(event.request));
                break;
            case Event::kGuess:
                all += "launch with " + text(static_cast<std::int64_t>(event.request)) + " right";
                break;
            case Event::kPropose:
                all += "launch to propose " + text(static_cast<std::int64_t>(event.request)) +
                       " right";
                break;
            case Event::kFail:
                all += "fail " + text(static_cast<std::int64_t>(event.request));
                break;
        }
    }
    return all;
}

Explored explore(const Configuration& configuration) {
    return Explorer(configuration).run();
}

}  // namespace tokenspeed::proof
