#include "sampling.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "errors.h"

namespace tokenspeed::cpu {

namespace {

template <class Pointer>
void check(const Rows<Pointer>& logits) {
    if (logits.type != Element::f32) throw KernelError("logits must be float32");
}

void check_tokens(std::span<const std::int64_t> tokens, std::int64_t vocabulary) {
    for (const std::int64_t token : tokens) {
        if (token < 0 || token >= vocabulary) {
            throw KernelError("token " + std::to_string(token) + " is not among the " +
                              std::to_string(vocabulary) + " that logits have");
        }
    }
}

// A thread's part of memory for rows of so many logits.
class Memories {
  public:
    Memories(Runtime& runtime, std::int64_t count)
        : room_(row_room(count)),
          lease_(runtime.lease()),
          memory_(lease_.memory(
              static_cast<std::size_t>(runtime.pool().threads() * row_arrays * room_) *
              sizeof(float))) {}

    RowMemory of(int thread) const {
        float* const at = reinterpret_cast<float*>(memory_) + thread * row_arrays * room_;
        return {at, at + room_, reinterpret_cast<std::int32_t*>(at + 2 * room_)};
    }

  private:
    std::int64_t room_;
    Runtime::Lease lease_;
    std::byte* memory_;
};

}  // namespace

void argmax(Runtime& runtime, const In& logits, std::int64_t* tokens) {
    check(logits);
    runtime.perform(logits.rows, [&runtime, logits, tokens](std::int64_t rows) {
        runtime.pool().run(static_cast<int>(rows), [&](int row, int) noexcept {
            tokens[row] =
                runtime.kernels().argmax(static_cast<const float*>(logits.at(row)), logits.columns);
        });
    });
}

void draw(Runtime& runtime, const Draw& call) {
    check(call.logits);
    const std::int64_t count = call.logits.columns;
    const Memories memories(runtime, count);
    runtime.pool().run(static_cast<int>(call.logits.rows), [&](int row, int thread) noexcept {
        const auto* const logits = static_cast<const float*>(call.logits.at(row));
        const DrawSettings settings{call.uniforms[row], call.temperatures[row], call.top_ks[row],
                                    call.top_ps[row], call.min_ps[row]};
        call.tokens[row] =
            draw_token(runtime.kernels(), logits, count, runtime.kernels().argmax(logits, count),
                       settings, memories.of(thread));
    });
}

void logprobs(Runtime& runtime, const Logprobs& call) {
    check(call.logits);
    const std::int64_t count = call.logits.columns;
    check_tokens({call.tokens, static_cast<std::size_t>(call.logits.rows)}, count);
    if (call.count > count) {
        throw KernelError("the " + std::to_string(call.count) + " likeliest of " +
                          std::to_string(count) + " tokens");
    }
    const Memories memories(runtime, count);
    runtime.pool().run(static_cast<int>(call.logits.rows), [&](int row, int thread) noexcept {
        const auto* const logits = static_cast<const float*>(call.logits.at(row));
        const Softmax softmax = softmax_of(runtime.kernels(), logits, count);
        call.chosen[row] = softmax.log_probability(logits[call.tokens[row]]);
        report_likeliest(runtime.kernels(), logits, count, call.count, softmax, memories.of(thread),
                         call.ids + row * call.count, call.values + row * call.count);
    });
}

void apply_bitmask(Runtime& runtime, const Bitmasks& call) {
    check(call.logits);
    const std::int64_t count = call.logits.columns;
    if (call.words_per_row * 32 < count) {
        throw KernelError(std::to_string(call.words_per_row) + " words have no bit for each of " +
                          std::to_string(count) + " logits");
    }
    runtime.pool().run(static_cast<int>(call.logits.rows), [&](int row, int) noexcept {
        auto* const logits = static_cast<float*>(call.logits.at(row));
        runtime.kernels().mask_logits(logits, call.words + row * call.words_per_row, count, logits);
    });
}

void penalise(std::span<float> logits, std::span<const std::int64_t> seen,
              std::span<const std::int32_t> output_counts, const Penalties& penalties) {
    check_tokens(seen, std::ssize(logits));
    if (seen.size() != output_counts.size()) throw KernelError("every token seen needs a count");
    for (std::size_t at = 0; at < seen.size(); ++at) {
        float& logit = logits[static_cast<std::size_t>(seen[at])];
        logit = penalties.apply(logit, output_counts[at]);
    }
}

void add_bias(std::span<float> logits, const Biases& biases) {
    check_tokens(biases.ids, std::ssize(logits));
    if (biases.ids.size() != biases.values.size()) {
        throw KernelError("every token with a bias needs one value");
    }
    add_bias(logits.data(), biases);
}

}  // namespace tokenspeed::cpu
