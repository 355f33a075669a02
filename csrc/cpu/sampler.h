// How the requests in the slots of an engine choose their tokens: everything between logits and
// tokens of a step, without a word to whoever planned it.
//
// Per row: log-probabilities of the logits as they came; bitmask; ends kept away until enough
// tokens are there; bias; penalties; the likeliest token, or a draw. A row that keeping ends away
// leaves nothing goes without it; one in which nothing is possible all the same is as it came, or,
// where it has a bitmask, has each token that this allows alike.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "logits.h"
#include "runtime.h"

namespace tokenspeed::cpu {

// What a request asks for.
struct SlotSettings {
    double temperature;  // 0 for the likeliest token
    std::int64_t top_k;
    double top_p, min_p;
    std::uint64_t seed;
    std::int64_t min_new_tokens;
    Penalties penalties;
    // How many of the likeliest tokens are reported beside the chosen one.
    std::optional<std::int64_t> logprobs;
    std::vector<std::int64_t> ends;  // tokens that wait for `min_new_tokens`
    std::vector<std::int64_t> bias_ids;
    std::vector<float> bias_values;
};

// What a request that is penalised has seen.
struct SlotTokens {
    std::span<const std::int32_t> prompt, output;
};

// The rows of a step that are to get a token.
struct SampledRows {
    Out logits;  // float32; changed meanwhile, and as before afterwards
    std::span<const std::int32_t> slots;
    // Which of its request's output tokens each is, 0 for the first.
    std::span<const std::int32_t> positions;
    // The likeliest of each row when it comes, the chosen one when it goes.
    std::int64_t* tokens;
};

// Where log-probabilities go, of the rows that want any in their order; `width` entries each.
struct Reports {
    std::span<float> chosen;
    std::int32_t* ids;
    float* values;
    std::int64_t width;
};

// One thread binds and samples, one at a time; others may say what a slot may get next.
class Sampler {
  public:
    Sampler(Runtime& runtime, std::int64_t slots, std::int64_t vocabulary);
    Sampler(const Sampler&) = delete;
    Sampler& operator=(const Sampler&) = delete;

    // Gives a slot to a request; `tokens` where it has penalties.
    // Throws KernelError: a slot or a token there is not.
    void bind(std::int64_t slot, SlotSettings settings, const std::optional<SlotTokens>& tokens);

    // The slot's next token waits until `allow` says which it may be.
    void expect(std::int64_t slot);
    // For the slot's first sample of the next call, and those right behind it, a bitmask each,
    // `stride` words apart: a bit for each token. They must stay until the slot is expected or
    // allowed again. Samples beyond them, or all where there are none, may be any token. Throws
    // KernelError: a slot there is not.
    void allow(std::int64_t slot, std::span<const std::int32_t> words, std::size_t stride);

    // Chooses the tokens, and counts them where penalties do.
    // Throws KernelError: other logits, or another number of reports, than these slots have.
    void sample(const SampledRows& rows, const Reports& reports);

    std::int64_t vocabulary() const { return vocabulary_; }

  private:
    struct Slot {
        SlotSettings settings{};
        // Tokens that a penalty touches, and how often each token is in the output; both empty
        // without penalties.
        std::vector<std::int32_t> seen;
        std::vector<bool> is_seen;
        std::vector<std::int32_t> output_counts;
        bool penalised = false;

        void see(std::int32_t token);
        std::size_t edits() const {
            return settings.ends.size() + settings.bias_ids.size() + seen.size();
        }
    };
    struct Gate {
        bool open = true;
        std::span<const std::int32_t> words{};
        std::size_t stride = 0;

        const std::int32_t* bitmask(std::size_t of_slot) const {
            const std::size_t begin = of_slot * stride;
            return begin < words.size() ? words.data() + begin : nullptr;
        }
    };
    class Edits;

    const Slot& slot(std::int32_t index) const;
    std::int64_t choose(const SampledRows& rows, std::int64_t row, const std::int32_t* words,
                        const RowMemory& memory, float* spare) const;

    Runtime& runtime_;
    std::int64_t vocabulary_;
    std::vector<Slot> slots_;
    std::mutex gates_mutex_;
    std::condition_variable opened_;
    std::vector<Gate> gates_;
};

}  // namespace tokenspeed::cpu
