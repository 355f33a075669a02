// The suffix automaton of a text that grows: what of it was there before, and what came after it.
//
// Built online (Blumer et al., "The smallest automaton recognizing the subwords of a text", 1985):
// appending a token takes O(1) time, amortised. At most 2 states and 3 transitions for each token;
// transitions are found by open addressing, and each state has its own in a list, so that a state
// can be cloned. A token of ordinary text takes 60 to 100 bytes, and none takes more than 140.
//
// A state remembers where its strings ended last, so that their continuation is read out of the
// text. That is brought up to date for the nearest ancestors of the newest state only, else a text
// of one token repeated would take O(n) a token; an ancestor farther away knows an earlier end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenspeed::control {

// A string that ends at a place of a text: `length` tokens, none if 0, the last at `end`.
struct Occurrence {
    std::int32_t length = 0;
    std::int32_t end = 0;
};

class SuffixAutomaton {
  public:
    SuffixAutomaton();

    // Makes room for a text of so many tokens.
    void reserve(std::size_t tokens);
    // If this throws, the automaton must not be used any more.
    void append(std::int32_t token);

    const std::vector<std::int32_t>& text() const noexcept { return text_; }
    // The longest suffix of the text that was there before, and where it ended before.
    Occurrence longest() const noexcept { return longest_; }
    // What came after an occurrence, its `index`th token; where the text ends first, it is taken to
    // go on as it went on since. Only of an occurrence that ends before the text does.
    std::int32_t after(Occurrence place, std::size_t index) const noexcept;

    // How much of another text's end is somewhere in this one, fed token by token. This text may
    // grow in between.
    class Matcher {
      public:
        void feed(const SuffixAutomaton& of, std::int32_t token) noexcept;
        Occurrence found(const SuffixAutomaton& of) const noexcept {
            return {length_, of.at(state_).end};
        }

      private:
        std::int32_t state_ = 0;
        std::int32_t length_ = 0;
    };

    // What is in use; room that is kept for more is not counted.
    std::size_t size_bytes() const noexcept;
    // What will be in use at most once so many more tokens were appended: a text of n tokens has at
    // most 2n states and 3n transitions (Blumer et al., 1985).
    std::size_t size_bytes_after(std::size_t more) const noexcept;

  private:
    struct State {
        std::int32_t link;    // the longest suffix that is in another state
        std::int32_t length;  // of its longest string
        std::int32_t end;     // where its strings ended last, as far as is known
        std::int32_t first;   // of its transitions
    };
    struct Transition {
        std::int32_t state;
        std::int32_t token;
        std::int32_t target;
        std::int32_t next;  // of the same state
    };

    State& at(std::int32_t state) noexcept { return states_[static_cast<std::size_t>(state)]; }
    const State& at(std::int32_t state) const noexcept {
        return states_[static_cast<std::size_t>(state)];
    }
    std::size_t place_of(std::int32_t state, std::int32_t token) const noexcept;
    const Transition* find(std::int32_t state, std::int32_t token) const noexcept;
    Transition* find(std::int32_t state, std::int32_t token) noexcept;
    void add(std::int32_t state, std::int32_t token, std::int32_t target);
    void grow_table(std::size_t places);
    std::int32_t clone(std::int32_t state, std::int32_t length);

    std::vector<std::int32_t> text_;
    std::vector<State> states_;
    std::vector<Transition> transitions_;
    std::vector<std::int32_t>
        table_;  // of transitions by state and token; kNone where there is none
    std::int32_t last_ = 0;
    Occurrence longest_;
};

}  // namespace tokenspeed::control
