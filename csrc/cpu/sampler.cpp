#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>

#include "errors.h"
#include "philox.h"

namespace tokenspeed::cpu {

namespace {

void check(bool fits, const std::string& message) {
    if (!fits) throw KernelError(message);
}

template <class Token>
void check_tokens(std::span<const Token> tokens, std::int64_t vocabulary) {
    for (const Token token : tokens) {
        check(token >= 0 && token < vocabulary,
              "token " + std::to_string(token) + " is not among the " + std::to_string(vocabulary) +
                  " that logits have");
    }
}

}  // namespace

// What a request does to a row: in place, to be taken back, or in a copy that its bitmask makes.
class Sampler::Edits {
  public:
    // `spare` has room for a row, and for what a slot edits.
    Edits(const Kernels& kernels, const Slot& slot, float* logits, std::int64_t count,
          const std::int32_t* words, float* spare)
        : kernels_(kernels),
          slot_(slot),
          logits_(logits),
          count_(count),
          words_(words),
          spare_(spare) {
        if (words_ != nullptr) return;
        float* to = spare_;
        for_each([&](float& logit) { *to++ = logit; });
    }

    float* edited() const { return words_ != nullptr ? spare_ : logits_; }

    void apply(bool excluding) {
        if (words_ != nullptr) kernels_.mask_logits(logits_, words_, count_, spare_);
        float* const row = edited();
        const SlotSettings& settings = slot_.settings;
        if (excluding) {
            for (const std::int64_t token : settings.ends) row[token] = -INFINITY;
        }
        add_bias(row, {settings.bias_ids, settings.bias_values});
        for (const std::int32_t token : slot_.seen) {
            const std::int32_t count = slot_.output_counts[static_cast<std::size_t>(token)];
            row[token] = settings.penalties.apply(row[token], count);
        }
    }
    void undo() {
        if (words_ != nullptr) return;
        const float* from = spare_;
        for_each([&](float& logit) { logit = *from++; });
    }
    // Whatever the logits are worth, the text stays what it must be.
    void forget_logits() {
        if (words_ == nullptr) return;
        std::fill(spare_, spare_ + count_, 0.0f);
        kernels_.mask_logits(spare_, words_, count_, spare_);
    }

  private:
    template <class F>
    void for_each(const F& f) {
        for (const std::int64_t token : slot_.settings.ends) f(logits_[token]);
        for (const std::int64_t token : slot_.settings.bias_ids) f(logits_[token]);
        for (const std::int32_t token : slot_.seen) f(logits_[token]);
    }

    const Kernels& kernels_;
    const Slot& slot_;
    float* logits_;
    std::int64_t count_;
    const std::int32_t* words_;
    float* spare_;
};

void Sampler::Slot::see(std::int32_t token) {
    const auto at = static_cast<std::size_t>(token);
    if (!is_seen[at]) seen.push_back(token);
    is_seen[at] = true;
}

Sampler::Sampler(Runtime& runtime, std::int64_t slots, std::int64_t vocabulary)
    : runtime_(runtime),
      vocabulary_(vocabulary),
      slots_(static_cast<std::size_t>(slots)),
      gates_(static_cast<std::size_t>(slots)) {}

void Sampler::bind(std::int64_t slot, SlotSettings settings,
                   const std::optional<SlotTokens>& tokens) {
    check(slot >= 0 && slot < std::ssize(slots_),
          "slot " + std::to_string(slot) + " of " + std::to_string(slots_.size()));
    check_tokens<std::int64_t>(settings.ends, vocabulary_);
    check_tokens<std::int64_t>(settings.bias_ids, vocabulary_);
    check(settings.bias_ids.size() == settings.bias_values.size(),
          "every token with a bias needs one value");
    Slot bound{std::move(settings), {}, {}, {}, tokens.has_value()};
    if (tokens) {
        check_tokens(tokens->prompt, vocabulary_);
        check_tokens(tokens->output, vocabulary_);
        bound.is_seen.resize(static_cast<std::size_t>(vocabulary_));
        bound.output_counts.resize(static_cast<std::size_t>(vocabulary_));
        if (bound.settings.penalties.repetition != 1.0f) {
            for (const std::int32_t token : tokens->prompt) bound.see(token);
        }
        for (const std::int32_t token : tokens->output) {
            bound.see(token);
            ++bound.output_counts[static_cast<std::size_t>(token)];
        }
    }
    slots_[static_cast<std::size_t>(slot)] = std::move(bound);
}

void Sampler::expect(std::int64_t slot) {
    const std::scoped_lock lock(gates_mutex_);
    gates_.at(static_cast<std::size_t>(slot)) = {.open = false};
}

void Sampler::allow(std::int64_t slot, std::span<const std::int32_t> words, std::size_t stride) {
    {
        const std::scoped_lock lock(gates_mutex_);
        gates_.at(static_cast<std::size_t>(slot)) = {true, words, stride};
    }
    opened_.notify_all();
}

const Sampler::Slot& Sampler::slot(std::int32_t index) const {
    return slots_[static_cast<std::size_t>(index)];
}

void Sampler::sample(const SampledRows& rows, const Reports& reports) {
    check(rows.logits.type == Element::f32 && rows.logits.columns == vocabulary_,
          "logits must be float32 of " + std::to_string(vocabulary_) + " tokens");
    // What is left to do of each row, in its turn.
    struct Row {
        std::int64_t index;
        const std::int32_t* words;
        std::optional<std::int64_t> report;
    };
    std::vector<Row> work;
    std::int64_t reported = 0, width = 0;
    std::size_t edits = 0, of_slot = 0;
    for (std::int64_t row = 0; row < std::ssize(rows.slots); ++row) {
        const std::int32_t index = rows.slots[static_cast<std::size_t>(row)];
        check(index >= 0 && index < std::ssize(slots_),
              "slot " + std::to_string(index) + " of " + std::to_string(slots_.size()));
        const Slot& one = slot(index);
        const SlotSettings& settings = one.settings;
        const bool again = row > 0 && rows.slots[static_cast<std::size_t>(row - 1)] == index;
        of_slot = again ? of_slot + 1 : 0;
        Row left{row, nullptr, {}};
        {
            std::unique_lock lock(gates_mutex_);
            const Gate& gate = gates_[static_cast<std::size_t>(index)];
            opened_.wait(lock, [&] { return gate.open; });
            left.words = gate.bitmask(of_slot);
        }
        if (settings.logprobs) {
            width = std::max(width, *settings.logprobs);
            left.report = reported++;
        }
        edits = std::max(edits, one.edits());
        const bool excluding =
            rows.positions[static_cast<std::size_t>(row)] < settings.min_new_tokens;
        if (left.words != nullptr || left.report || settings.temperature > 0.0 || one.penalised ||
            !settings.bias_ids.empty() || excluding) {
            work.push_back(left);
        }
    }
    check(reported == std::ssize(reports.chosen),
          std::to_string(reported) + " rows report log-probabilities, and there is room for " +
              std::to_string(reports.chosen.size()));
    check(width <= reports.width, "too little room for log-probabilities");
    if (work.empty()) return;
    const std::int64_t room = row_room(vocabulary_);
    const std::int64_t stride =
        row_arrays * room + std::max(room, static_cast<std::int64_t>(edits));
    const Runtime::Lease lease = runtime_.lease();
    auto* const memory = reinterpret_cast<float*>(
        lease.memory(static_cast<std::size_t>(runtime_.pool().threads() * stride) * sizeof(float)));
    runtime_.pool().run(static_cast<int>(work.size()), [&](int at, int thread) noexcept {
        const Row& row = work[static_cast<std::size_t>(at)];
        float* const own = memory + thread * stride;
        const RowMemory row_memory{own, own + room,
                                   reinterpret_cast<std::int32_t*>(own + 2 * room)};
        const auto* const logits = static_cast<const float*>(rows.logits.at(row.index));
        rows.tokens[row.index] =
            choose(rows, row.index, row.words, row_memory, own + row_arrays * room);
        if (!row.report) return;
        // The logits are again what they were.
        const Softmax softmax = softmax_of(runtime_.kernels(), logits, vocabulary_);
        reports.chosen[static_cast<std::size_t>(*row.report)] =
            softmax.log_probability(logits[rows.tokens[row.index]]);
        const std::int64_t likeliest =
            *slot(rows.slots[static_cast<std::size_t>(row.index)]).settings.logprobs;
        report_likeliest(runtime_.kernels(), logits, vocabulary_, likeliest, softmax, row_memory,
                         reports.ids + *row.report * reports.width,
                         reports.values + *row.report * reports.width);
    });
    for (const Row& row : work) {
        Slot& one =
            slots_[static_cast<std::size_t>(rows.slots[static_cast<std::size_t>(row.index)])];
        if (!one.penalised) continue;
        const std::int64_t token = rows.tokens[row.index];
        one.see(static_cast<std::int32_t>(token));
        ++one.output_counts[static_cast<std::size_t>(token)];
    }
}

std::int64_t Sampler::choose(const SampledRows& rows, std::int64_t row, const std::int32_t* words,
                             const RowMemory& memory, float* spare) const {
    const Kernels& kernels = runtime_.kernels();
    const Slot& one = slot(rows.slots[static_cast<std::size_t>(row)]);
    const SlotSettings& settings = one.settings;
    auto* const logits = static_cast<float*>(rows.logits.at(row));
    const auto position = rows.positions[static_cast<std::size_t>(row)];
    const auto pick = [&](const float* from, std::int64_t likeliest) {
        if (settings.temperature == 0.0) return likeliest;
        return draw_token(kernels, from, vocabulary_, likeliest,
                          {uniform(settings.seed, static_cast<std::uint32_t>(position)),
                           settings.temperature, settings.top_k, settings.top_p, settings.min_p},
                          memory);
    };
    bool excluding = position < settings.min_new_tokens;
    if (words == nullptr && !one.penalised && settings.bias_ids.empty() && !excluding) {
        return pick(logits, rows.tokens[row]);
    }
    Edits edits(kernels, one, logits, vocabulary_, words, spare);
    const auto likeliest = [&] { return kernels.argmax(edits.edited(), vocabulary_); };
    const auto impossible = [&](std::int64_t token) {
        return capped(edits.edited()[token]) == -INFINITY;
    };
    edits.apply(excluding);
    std::int64_t best = likeliest();
    if (excluding && impossible(best)) {
        edits.undo();
        edits.apply(false);
        best = likeliest();
    }
    if (impossible(best)) {
        edits.undo();
        edits.forget_logits();
        best = likeliest();
    }
    const std::int64_t token = pick(edits.edited(), best);
    edits.undo();
    return token;
}

}  // namespace tokenspeed::cpu
