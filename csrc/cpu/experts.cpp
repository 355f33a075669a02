#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "elements.h"
#include "errors.h"
#include "pieces.h"
#include "quantise.h"

namespace tokenspeed::cpu {

namespace {

// Elements of a chunk of a job that goes row by row.
constexpr std::int64_t elements_per_chunk = 1 << 14;
constexpr std::int64_t line = 64;

// The scores of one token's experts, by which they are weighed.
void score(const Routing& call, std::int64_t row, std::span<float> scores) {
    const std::int64_t count = call.logits.columns;
    float most = -std::numeric_limits<float>::infinity();
    for (std::int64_t at = 0; at < count; ++at) {
        const float logit = element_of(call.logits, row, at);
        scores[static_cast<std::size_t>(at)] = logit;
        most = std::max(most, logit);
    }
    if (call.scoring == Scoring::chosen) return;
    double sum = 0.0;
    for (float& value : scores) {
        if (call.scoring == Scoring::sigmoid) {
            value = static_cast<float>(1.0 / (1.0 + std::exp(-double{value})));
        } else {
            sum += std::exp(double{value} - double{most});
        }
    }
    if (call.scoring == Scoring::sigmoid) return;
    for (float& value : scores) {
        value = static_cast<float>(std::exp(double{value} - double{most}) / sum);
    }
}

// Leaves only the experts of the best groups to be chosen. A group is worth its best expert, or its
// best two together where a bias is added.
void keep_groups(const Routing& call, std::span<float> choice, std::span<float> worth) {
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    const std::int64_t size = call.logits.columns / call.groups;
    for (std::int64_t group = 0; group < call.groups; ++group) {
        float best = nothing, second = nothing;
        for (std::int64_t at = group * size; at < (group + 1) * size; ++at) {
            const float value = choice[static_cast<std::size_t>(at)];
            if (value > best) {
                second = best;
                best = value;
            } else {
                second = std::max(second, value);
            }
        }
        // A group of one expert has no second.
        const bool both = call.bias != nullptr && size > 1;
        worth[static_cast<std::size_t>(group)] = both ? best + second : best;
    }
    for (std::int64_t left = call.groups_kept; left < call.groups; ++left) {
        // Of equal groups the last one goes first.
        auto worst = worth.begin();
        for (auto at = worth.begin(); at != worth.end(); ++at) {
            if (!std::isnan(*at) && (std::isnan(*worst) || *at <= *worst)) worst = at;
        }
        const std::int64_t group = worst - worth.begin();
        *worst = std::numeric_limits<float>::quiet_NaN();
        std::fill_n(choice.begin() + group * size, size, nothing);
    }
}

// A row's experts; `memory` has room for two numbers an expert and one a group.
void route_row(const Routing& call, std::int64_t row, std::span<float> memory) {
    const auto experts = static_cast<std::size_t>(call.logits.columns);
    const std::span<float> scores = memory.first(experts);
    const std::span<float> choice = memory.subspan(experts, experts);
    score(call, row, scores);
    std::ranges::copy(scores, choice.begin());
    if (call.bias != nullptr) {
        for (std::size_t at = 0; at < experts; ++at) choice[at] += call.bias[at];
    }
    // An expert that was chosen is no number any more, and what comes as none is the last choice.
    for (float& value : choice) {
        if (std::isnan(value)) value = -std::numeric_limits<float>::infinity();
    }
    if (call.groups > 1) keep_groups(call, choice, memory.subspan(2 * experts));
    std::int64_t* const chosen = call.chosen + row * call.count;
    float* const weights = call.weights + row * call.count;
    float most = -std::numeric_limits<float>::infinity();
    for (std::int64_t place = 0; place < call.count; ++place) {
        std::size_t best = experts;
        for (std::size_t at = 0; at < experts; ++at) {
            if (!std::isnan(choice[at]) && (best == experts || choice[at] > choice[best])) {
                best = at;
            }
        }
        choice[best] = std::numeric_limits<float>::quiet_NaN();
        chosen[place] = static_cast<std::int64_t>(best);
        weights[place] = scores[best];
        most = std::max(most, scores[best]);
    }
    double sum = 0.0;
    if (call.scoring == Scoring::chosen) {
        for (std::int64_t place = 0; place < call.count; ++place) {
            sum += std::exp(double{weights[place]} - double{most});
        }
        for (std::int64_t place = 0; place < call.count; ++place) {
            weights[place] =
                static_cast<float>(std::exp(double{weights[place]} - double{most}) / sum);
        }
    }
    if (call.normalise) {
        // What is added keeps a token whose scores are all zero from becoming NaN.
        sum = 1e-20;
        for (std::int64_t place = 0; place < call.count; ++place) sum += double{weights[place]};
    }
    for (std::int64_t place = 0; place < call.count; ++place) {
        const double weight = double{weights[place]} / (call.normalise ? sum : 1.0);
        weights[place] = static_cast<float>(weight * double{call.scale});
    }
}

// A token that goes to an expert, by the token's number and the weight's.
struct Visit {
    std::int64_t token, weight;
};

// In which forms a product reads its rows: the parts of its matrix may be of both kinds.
struct Reads {
    bool dense = false, quantised = false;

    explicit Reads(const std::vector<const PackedMatrix*>& parts) {
        for (const PackedMatrix* part : parts) (part->format().dense() ? dense : quantised) = true;
    }
};

// Rows of one expert, behind those of the experts before it.
struct Share {
    std::size_t expert;
    std::int64_t first, rows;
    Reads reads_x, reads_hidden;
    QuantisedRows x, hidden;
};

// The visits of a step by expert, and within one by token.
struct Visits {
    std::vector<Visit> visits;
    std::vector<Share> shares;

    Visits(const Experts& call, std::int64_t tokens) {
        const auto held = static_cast<std::int64_t>(call.gate_up.size());
        const auto per_token = static_cast<std::int64_t>(call.chosen.size()) / call.x.rows;
        std::vector<std::int64_t> begins(call.gate_up.size() + 1);
        const auto each = [&](const auto& visit) {
            for (std::int64_t at = 0; at < tokens * per_token; ++at) {
                const std::int64_t expert = call.chosen[static_cast<std::size_t>(at)] - call.first;
                if (expert >= 0 && expert < held) visit(static_cast<std::size_t>(expert), at);
            }
        };
        each([&](std::size_t expert, std::int64_t) { ++begins[expert + 1]; });
        for (std::size_t expert = 0; expert < call.gate_up.size(); ++expert) {
            const std::int64_t rows = begins[expert + 1];
            if (rows > 0) {
                shares.push_back({expert,
                                  begins[expert],
                                  rows,
                                  Reads(call.gate_up[expert]),
                                  Reads(call.down[expert]),
                                  {},
                                  {}});
            }
            begins[expert + 1] += begins[expert];
        }
        visits.resize(static_cast<std::size_t>(begins.back()));
        each([&](std::size_t expert, std::int64_t at) {
            visits[static_cast<std::size_t>(begins[expert]++)] = {at / per_token, at};
        });
    }
};

// Memory cut from one piece, each part aligned to a line.
class Carver {
  public:
    std::int64_t take(std::int64_t size_bytes) {
        const std::int64_t at = size_bytes_;
        size_bytes_ += ceil_div(size_bytes, line) * line;
        return at;
    }
    std::size_t size_bytes() const { return static_cast<std::size_t>(size_bytes_); }

  private:
    std::int64_t size_bytes_ = 0;
};

// A job of some rows of each share.
struct Rowwise {
    const Share* share;
    std::int64_t begin, end;  // within the share
};

std::vector<Rowwise> cut_rows(const std::vector<Share>& shares, std::int64_t columns) {
    std::vector<Rowwise> found;
    for (const Share& share : shares) {
        // Quantised rows of a group lie in the same lines, which one thread writes.
        const std::int64_t together = std::max<std::int64_t>(1, share.x.group_rows);
        const std::int64_t high =
            std::max<std::int64_t>(1, elements_per_chunk / (columns * together)) * together;
        for (std::int64_t begin = 0; begin < share.rows; begin += high) {
            found.push_back({&share, begin, std::min(share.rows, begin + high)});
        }
    }
    return found;
}

// One product of every share, as one job.
void multiply(Runtime& runtime, const std::vector<Share>& shares, const ExpertMatrices& matrices,
              const In& x, QuantisedRows Share::* quantised, const void* bias, const Out& y) {
    const int threads = runtime.pool().threads();
    const std::int64_t element = y.element_size_bytes();
    std::vector<Piece> pieces;
    for (const Share& share : shares) {
        std::int64_t first = 0;
        for (const PackedMatrix* part : matrices[share.expert]) {
            const bool dense = part->format().dense();
            const auto* const added = static_cast<const std::byte*>(bias);
            const std::int64_t place = static_cast<std::int64_t>(share.expert) * y.columns + first;
            pieces.emplace_back(
                runtime, threads, *part,
                Product{.weights = part->data(),
                        .inputs = step_count(part->inputs()) * step_inputs,
                        .outputs = part->outputs(),
                        .x = share.*quantised,
                        .dense = dense ? x.at(share.first) : nullptr,
                        .dense_stride = x.stride,
                        .bias = added == nullptr ? nullptr : added + place * element,
                        .y = static_cast<std::byte*>(y.at(share.first)) + first * element,
                        .y_stride = y.stride,
                        .y_type = y.type,
                        .rows = share.rows},
                pieces.empty() ? 0 : pieces.back().chunk_end);
            first += part->outputs();
        }
    }
    const Kernels& kernels = runtime.kernels();
    runtime.pool().run(pieces.back().chunk_end, [&](int chunk, int thread) noexcept {
        const auto piece =
            std::upper_bound(pieces.begin(), pieces.end(), chunk,
                             [](int wanted, const Piece& one) { return wanted < one.chunk_end; });
        const int begin = piece == pieces.begin() ? 0 : (piece - 1)->chunk_end;
        kernels.multiply[piece->format_index](piece->product, piece->part(chunk - begin),
                                              runtime.scratch(thread));
    });
}

void run_experts(Runtime& runtime, const Experts& call, std::int64_t tokens) {
    Visits found(call, tokens);
    auto& [visits, shares] = found;
    const auto lease = runtime.lease();
    const Kernels& kernels = runtime.kernels();
    const std::int64_t features = call.x.columns;
    const std::int64_t hidden = call.down.front().front()->inputs();
    const std::int64_t element = call.x.element_size_bytes();
    const auto rows = static_cast<std::int64_t>(visits.size());
    // Dense weights are as wide as whole steps, and so are their rows.
    const auto wide = [](std::int64_t columns) { return step_count(columns) * step_inputs; };
    const bool hidden_dense =
        std::ranges::any_of(shares, [](const Share& share) { return share.reads_hidden.dense; });
    Carver carver;
    const std::int64_t x_at = carver.take(rows * wide(features) * element);
    const std::int64_t both_at = carver.take(rows * 2 * hidden * element);
    const std::int64_t hidden_at = hidden_dense ? carver.take(rows * wide(hidden) * element) : 0;
    const std::int64_t found_at = carver.take(rows * features * element);
    std::vector<std::pair<std::int64_t, std::int64_t>> quantised_at;
    for (const Share& share : shares) {
        const auto room = [&](const Reads& reads, std::int64_t columns) {
            return carver.take(reads.quantised ? quantised_size_bytes(kernels, share.rows, columns)
                                               : 0);
        };
        const std::int64_t first = room(share.reads_x, features);
        quantised_at.emplace_back(first, room(share.reads_hidden, hidden));
    }
    std::byte* const memory = lease.memory(carver.size_bytes());
    for (std::size_t at = 0; at < shares.size(); ++at) {
        // Products of dense rows go by how many lie together, too.
        Share& share = shares[at];
        share.x = quantised_rows(kernels, memory + quantised_at[at].first, share.rows);
        share.hidden = quantised_rows(kernels, memory + quantised_at[at].second, share.rows);
        if (share.reads_x.quantised) fill_up(share.x, share.rows, features);
        if (share.reads_hidden.quantised) fill_up(share.hidden, share.rows, hidden);
    }
    const auto matrix = [&](std::int64_t at, std::int64_t columns, std::int64_t stride) {
        return Out{memory + at, call.x.type, rows, columns, stride};
    };
    const Out x = matrix(x_at, features, wide(features));
    const Out both = matrix(both_at, 2 * hidden, 2 * hidden);
    const Out gated = matrix(hidden_at, hidden, wide(hidden));
    const Out results = matrix(found_at, features, features);
    const auto in = [](const Out& out) {
        return In{out.data, out.type, out.rows, out.columns, out.stride};
    };
    // The rows [first, ...) of a share.
    const auto of = [](const auto& all, const Share& share) {
        auto part = all.first(share.rows);
        part.data = all.at(share.first);
        return part;
    };
    if (!shares.empty()) {
        std::vector<Rowwise> jobs = cut_rows(shares, features);
        runtime.pool().run(static_cast<int>(jobs.size()), [&](int chunk, int) noexcept {
            const auto& [share, begin, end] = jobs[static_cast<std::size_t>(chunk)];
            const In own = of(in(x), *share);
            for (std::int64_t row = begin; row < end; ++row) {
                auto* const to = static_cast<std::byte*>(x.at(share->first + row));
                const Visit& visit = visits[static_cast<std::size_t>(share->first + row)];
                const auto used = static_cast<std::size_t>(features * element);
                std::memcpy(to, call.x.at(visit.token), used);
                std::memset(to + used, 0,
                            static_cast<std::size_t>((wide(features) - features) * element));
                if (share->reads_x.quantised) kernels.quantise(own, row, share->x);
            }
        });
        multiply(runtime, shares, call.gate_up, in(x), &Share::x, call.gate_up_bias, both);
        const Activation activation = call.limit ? Activation::limited : Activation::silu;
        jobs = cut_rows(shares, 2 * hidden);
        runtime.pool().run(static_cast<int>(jobs.size()), [&](int chunk, int) noexcept {
            const auto& [share, begin, end] = jobs[static_cast<std::size_t>(chunk)];
            const auto write = [&](const Result& to, std::int64_t row) {
                const float limit = call.limit.value_or(0.0f);
                kernels.gate({activation, of(in(both), *share), to, limit}, row, 0, hidden);
            };
            for (std::int64_t row = begin; row < end; ++row) {
                if (share->reads_hidden.quantised) {
                    const Out shape{nullptr, Element::f32, share->rows, hidden, hidden};
                    write({shape, share->hidden}, row);
                }
                if (share->reads_hidden.dense) {
                    write({of(gated, *share), {}}, row);
                    auto* const row_at = static_cast<std::byte*>(gated.at(share->first + row));
                    std::memset(row_at + hidden * element, 0,
                                static_cast<std::size_t>((wide(hidden) - hidden) * element));
                }
            }
        });
        multiply(runtime, shares, call.down, in(gated), &Share::hidden, call.down_bias, results);
    }
    // Where each token's results are, in the order of experts.
    std::vector<std::int64_t> ends(static_cast<std::size_t>(tokens) + 1);
    for (const Visit& visit : visits) ++ends[static_cast<std::size_t>(visit.token) + 1];
    for (std::size_t token = 0; token < static_cast<std::size_t>(tokens); ++token) {
        ends[token + 1] += ends[token];
    }
    std::vector<std::int64_t> order(visits.size()), next(ends.begin(), ends.end() - 1);
    for (std::size_t at = 0; at < visits.size(); ++at) {
        const auto token = static_cast<std::size_t>(visits[at].token);
        order[static_cast<std::size_t>(next[token]++)] = static_cast<std::int64_t>(at);
    }
    const In terms = in(results);
    runtime.pool().run(static_cast<int>(tokens), [&](int token, int) noexcept {
        for (std::int64_t at = 0; at < features; ++at) {
            float sum = 0.0f;
            for (std::int64_t place = ends[static_cast<std::size_t>(token)];
                 place < ends[static_cast<std::size_t>(token) + 1]; ++place) {
                const std::int64_t row = order[static_cast<std::size_t>(place)];
                const auto weight =
                    static_cast<std::size_t>(visits[static_cast<std::size_t>(row)].weight);
                sum += element_of(terms, row, at) * call.weights[weight];
            }
            store_element(call.y, token, at, sum);
        }
    });
}

// Throws where the matrices of experts are not of one shape, or dense ones not of x's type.
void expect_matrices(const ExpertMatrices& matrices, std::int64_t inputs, std::int64_t outputs,
                     const In& x) {
    for (const auto& parts : matrices) {
        std::int64_t found = 0;
        for (const PackedMatrix* part : parts) {
            const Format& format = part->format();
            found += part->outputs();
            const bool fits = !format.dense() || format.bits == 8 * x.element_size_bytes();
            if (part->inputs() != inputs || !fits) {
                throw KernelError("a matrix of an expert takes " + std::to_string(part->inputs()) +
                                  " inputs in " + std::string(format.name) + ", but " +
                                  std::to_string(inputs) + " come, of x's type");
            }
        }
        if (found != outputs) {
            throw KernelError("a matrix of an expert gives " + std::to_string(found) +
                              " outputs, but " + std::to_string(outputs) + " are wanted");
        }
    }
}

}  // namespace

void route(Runtime& runtime, const Routing& call) {
    if (call.count < 1 || call.count > call.logits.columns || call.groups < 1 ||
        call.logits.columns % call.groups != 0 || call.groups_kept < 1 ||
        call.groups_kept > call.groups) {
        throw KernelError(std::to_string(call.count) + " of " +
                          std::to_string(call.logits.columns) + " experts in " +
                          std::to_string(call.groups) + " groups cannot be chosen");
    }
    runtime.perform(call.logits.rows, [&runtime, call](std::int64_t rows) {
        const auto size = static_cast<std::size_t>(2 * call.logits.columns + call.groups);
        std::vector<float> memory(size * static_cast<std::size_t>(runtime.pool().threads()));
        runtime.pool().run(static_cast<int>(rows), [&](int row, int thread) noexcept {
            const auto at = size * static_cast<std::size_t>(thread);
            route_row(call, row, std::span(memory).subspan(at, size));
        });
    });
}

void experts(Runtime& runtime, const Experts& call) {
    if (call.gate_up.empty() || call.gate_up.size() != call.down.size() ||
        call.gate_up.front().empty() || call.down.front().empty()) {
        throw KernelError("experts need a matrix of gates and ups each, and one down");
    }
    const std::int64_t hidden = call.down.front().front()->inputs();
    expect_matrices(call.gate_up, call.x.columns, 2 * hidden, call.x);
    expect_matrices(call.down, hidden, call.x.columns, call.x);
    if (call.y.rows != call.x.rows || call.y.columns != call.x.columns ||
        call.y.type != call.x.type || call.chosen.size() != call.weights.size() ||
        (call.x.rows > 0 && call.chosen.size() % static_cast<std::size_t>(call.x.rows) != 0)) {
        throw KernelError("what experts give is of x's shape and type, and each row has as many");
    }
    runtime.perform(call.y.rows, [&runtime, call](std::int64_t rows) {
        if (rows > 0) run_experts(runtime, call, rows);
    });
}

}  // namespace tokenspeed::cpu
