#include "suffix_automaton.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace tokenspeed::control {

namespace {

constexpr std::int32_t kNone = -1;  // no state, no transition
constexpr std::int32_t kRoot = 0;
// Ancestors of the newest state that learn where it ended.
constexpr int kAncestors = 24;
constexpr std::size_t kTableMin = 64;

std::size_t hash(std::int32_t state, std::int32_t token) noexcept {
    std::uint64_t mixed = (static_cast<std::uint64_t>(static_cast<std::uint32_t>(state)) << 32) |
                          static_cast<std::uint32_t>(token);
    mixed *= 0x9e3779b97f4a7c15;
    return static_cast<std::size_t>(mixed ^ (mixed >> 29));
}

}  // namespace

SuffixAutomaton::SuffixAutomaton() : table_(kTableMin, kNone) {
    states_.push_back({kNone, 0, 0, kNone});
}

void SuffixAutomaton::reserve(std::size_t tokens) {
    text_.reserve(tokens);
    states_.reserve(tokens * 3 / 2);
    transitions_.reserve(tokens * 2);
    if (const std::size_t places = std::bit_ceil(tokens * 3); places > table_.size()) {
        grow_table(places);
    }
}

std::size_t SuffixAutomaton::place_of(std::int32_t state, std::int32_t token) const noexcept {
    std::size_t place = hash(state, token) & (table_.size() - 1);
    while (table_[place] != kNone) {
        const Transition& found = transitions_[static_cast<std::size_t>(table_[place])];
        if (found.state == state && found.token == token) break;
        place = (place + 1) & (table_.size() - 1);
    }
    return place;
}

const SuffixAutomaton::Transition* SuffixAutomaton::find(std::int32_t state,
                                                         std::int32_t token) const noexcept {
    const std::int32_t found = table_[place_of(state, token)];
    return found == kNone ? nullptr : &transitions_[static_cast<std::size_t>(found)];
}

SuffixAutomaton::Transition* SuffixAutomaton::find(std::int32_t state,
                                                   std::int32_t token) noexcept {
    return const_cast<Transition*>(std::as_const(*this).find(state, token));
}

void SuffixAutomaton::grow_table(std::size_t places) {
    table_.assign(places, kNone);
    for (std::size_t i = 0; i < transitions_.size(); ++i) {
        const Transition& moved = transitions_[i];
        table_[place_of(moved.state, moved.token)] = static_cast<std::int32_t>(i);
    }
}

// At most three of four places are taken.
void SuffixAutomaton::add(std::int32_t state, std::int32_t token, std::int32_t target) {
    if ((transitions_.size() + 1) * 4 > table_.size() * 3) grow_table(table_.size() * 2);
    table_[place_of(state, token)] = static_cast<std::int32_t>(transitions_.size());
    transitions_.push_back({state, token, target, at(state).first});
    at(state).first = static_cast<std::int32_t>(transitions_.size()) - 1;
}

// A state of the strings of `state` that are no longer than `length`.
std::int32_t SuffixAutomaton::clone(std::int32_t state, std::int32_t length) {
    const auto copy = static_cast<std::int32_t>(states_.size());
    states_.push_back({at(state).link, length, at(state).end, kNone});
    for (std::int32_t i = at(state).first; i != kNone;) {
        const Transition shared = transitions_[static_cast<std::size_t>(i)];
        add(copy, shared.token, shared.target);
        i = shared.next;
    }
    at(state).link = copy;
    return copy;
}

void SuffixAutomaton::append(std::int32_t token) {
    const auto end = static_cast<std::int32_t>(text_.size());
    text_.push_back(token);
    const auto newest = static_cast<std::int32_t>(states_.size());
    states_.push_back({kRoot, end + 1, end, kNone});
    std::int32_t state = last_;
    for (; state != kNone && find(state, token) == nullptr; state = at(state).link) {
        add(state, token, newest);
    }
    if (state != kNone) {
        std::int32_t target = find(state, token)->target;
        if (at(target).length != at(state).length + 1) {
            const std::int32_t copy = clone(target, at(state).length + 1);
            for (; state != kNone; state = at(state).link) {
                Transition* leads = find(state, token);
                if (leads == nullptr || leads->target != target) break;
                leads->target = copy;
            }
            target = copy;
        }
        at(newest).link = target;
    }
    last_ = newest;
    const std::int32_t before = at(newest).link;
    longest_ = {at(before).length, at(before).end};
    state = before;
    for (int i = 0; i < kAncestors && state != kRoot; ++i, state = at(state).link) {
        at(state).end = end;
    }
}

std::int32_t SuffixAutomaton::after(Occurrence place, std::size_t index) const noexcept {
    const auto begin = static_cast<std::size_t>(place.end) + 1;
    return text_[begin + index % (text_.size() - begin)];
}

// A state that was cloned since is behind its clone: what was matched may be shorter than that.
void SuffixAutomaton::Matcher::feed(const SuffixAutomaton& of, std::int32_t token) noexcept {
    for (;;) {
        if (const Transition* leads = of.find(state_, token)) {
            state_ = leads->target;
            ++length_;
            return;
        }
        if (state_ == kRoot) return;
        state_ = of.at(state_).link;
        length_ = std::min(length_, of.at(state_).length);
    }
}

std::size_t SuffixAutomaton::size_bytes() const noexcept {
    return text_.size() * sizeof(std::int32_t) + states_.size() * sizeof(State) +
           transitions_.size() * sizeof(Transition) + table_.size() * sizeof(std::int32_t);
}

std::size_t SuffixAutomaton::size_bytes_after(std::size_t more) const noexcept {
    const std::size_t tokens = text_.size() + more;
    const std::size_t states = std::min(states_.size() + 2 * more, 2 * tokens + 1);
    const std::size_t transitions = 3 * tokens;
    std::size_t places = table_.size();
    while (transitions * 4 > places * 3) places *= 2;
    return tokens * sizeof(std::int32_t) + states * sizeof(State) +
           transitions * sizeof(Transition) + places * sizeof(std::int32_t);
}

}  // namespace tokenspeed::control
