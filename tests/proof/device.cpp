#include "device.h"

#include <algorithm>
#include <limits>

#include "wrong.h"

namespace tokenspeed::proof {

namespace {

constexpr std::int64_t kNothing = std::numeric_limits<std::int64_t>::min();

std::size_t index(std::int32_t value) {
    return static_cast<std::size_t>(value);
}

}  // namespace

Device::Device(const control::Config& config, const Histories& histories)
    : histories_(&histories),
      step_tokens_max_(config.step_tokens_max),
      step_drafts_max_(config.step_drafts_max),
      step_proposals_max_(config.step_drafts_max > 0 ? config.step_proposals_max : 0),
      proposal_length_max_(config.proposal_length_max),
      seats_(index(config.slots_max)) {
    for (const control::GroupConfig& group : config.groups) {
        groups_.emplace_back(
            group, Storage::Sizes{config.page_size, config.slots_max, config.context_max});
    }
    std::ranges::sort(groups_, {}, &Storage::kind);
    if (groups_.back().kind() == control::GroupKind::kRecurrent) step_proposals_max_ = 0;
}

Device::Seat& Device::seat(std::int32_t slot) {
    expect(slot >= 0 && index(slot) < seats_.size(), "device: a slot that does not exist");
    return seats_[index(slot)];
}

std::vector<std::int32_t> Device::launch(const control::Plan& plan) {
    begin(plan);
    std::vector<Row> rows = this->rows(plan);
    const std::vector<std::int32_t> samples = sample(plan, rows);
    for (std::size_t i = 0; i < groups_.size(); ++i) {
        groups_[i].begin(plan.groups[i], plan.transfers);
        groups_[i].write(rows, plan.groups[i].kv_slots);
        groups_[i].read(rows);
        groups_[i].end(plan.groups[i]);
    }
    ++in_flight_;
    return samples;
}

void Device::begin(const control::Plan& plan) {
    const std::size_t rows = plan.row_slots.size();
    const std::size_t transfers = plan.transfers.ids.size();
    expect(rows > 0 || transfers > 0, "device: a plan of nothing");
    expect(plan.query_starts.size() == rows + 1 && plan.query_starts.front() == 0 &&
               index(plan.query_starts.back()) == plan.token_ids.size() &&
               plan.context_lens.size() == rows &&
               plan.sample_positions.size() == plan.sample_rows.size() &&
               plan.propose_counts.size() == (step_proposals_max_ > 0 ? rows : 0) &&
               plan.bound_slots.size() == plan.bound_requests.size() &&
               plan.transfers.requests.size() == transfers &&
               plan.transfers.kinds.size() == transfers && plan.groups.size() == groups_.size(),
           "device: the columns of a plan disagree");
    expect(plan.token_ids.size() <= index(step_tokens_max_), "device: a plan is over its budget");
    expect(index(plan.decode_count) <= rows, "device: a plan decodes more rows than it has");
    expect(!step_ || *step_ + 1 == plan.step.value, "device: a step was left out");
    step_ = plan.step.value;
    for (std::size_t i = 0; i < plan.bound_slots.size(); ++i) {
        seat(plan.bound_slots[i]) = {plan.bound_requests[i], std::nullopt, 0, false, 0};
        for (Storage& group : groups_) group.bind(plan.bound_slots[i]);
    }
    for (std::size_t i = 0; i < transfers; ++i) {
        const auto [place, fresh] = transfers_.insert(
            {plan.transfers.requests[i],
             {plan.transfers.ids[i], static_cast<control::TransferKind>(plan.transfers.kinds[i])}});
        expect(fresh, "device: a request has two transfers at a time");
    }
}

std::vector<Row> Device::rows(const control::Plan& plan) {
    std::vector<Row> rows;
    std::vector<bool> taken(seats_.size());
    std::ptrdiff_t drafted = 0;
    for (std::size_t i = 0; i < plan.row_slots.size(); ++i) {
        const std::int32_t slot = plan.row_slots[i];
        Seat& seated = seat(slot);
        expect(seated.request.has_value(), "device: a row of a slot that was never bound");
        expect(!taken[index(slot)], "device: a slot has two rows in a step");
        taken[index(slot)] = true;
        expect(!transfers_.contains(*seated.request), "device: a row of a request that travels");
        Row row{slot, *seated.request, plan.context_lens[i], {}, histories_->of(*seated.request)};
        const auto first = plan.token_ids.begin() + plan.query_starts[i];
        const auto last = plan.token_ids.begin() + plan.query_starts[i + 1];
        expect(first < last, "device: a row without tokens");
        const auto& known = row.history.tokens;
        if (i < index(plan.decode_count)) {
            expect(seated.last.has_value(), "device: a decode row has nothing to feed");
            expect(row.start == seated.fed, "device: a decode row does not continue its request");
            expect(!seated.speculates, "device: a row goes on from a draft that is in flight");
            row.tokens = {*seated.last};
            row.tokens.insert(row.tokens.end(), first + 1, last);
            drafted += last - first - 1;
            expect(!row.history.foreseen || index(row.end()) < known.size(),
                   "device: a row computes a token that nobody asked for");
        } else {
            row.tokens.assign(first, last);
            expect(index(row.end()) <= known.size(), "device: a prompt goes on past its end");
            seated.last.reset();
        }
        rows.push_back(std::move(row));
    }
    expect(drafted <= step_drafts_max_, "device: a plan drafts more than it may");
    return rows;
}

// The tokens sampled after each of the row's last ones, of which a decode row has all. What follows
// a wrong guess is nothing; it repeats the draft here, so as to mislead.
std::vector<std::int32_t> Device::verify(const Row& row) {
    const auto after = [&](std::size_t end) {
        // A doomed row may run past the end of its request; nobody will see its token.
        return end < row.history.tokens.size() ? row.history.tokens[end]
                                               : static_cast<std::int32_t>(end % 2);
    };
    std::vector<std::int32_t> samples;
    bool right = true;
    for (std::size_t i = 0; i < row.tokens.size(); ++i) {
        const bool last = i + 1 == row.tokens.size();
        const std::int32_t token = after(index(row.start) + i + 1);
        samples.push_back(right || last ? token : row.tokens[i + 1]);
        right = right && !last && row.tokens[i + 1] == token;
    }
    return samples;
}

std::vector<std::int32_t> Device::sample(const control::Plan& plan, std::vector<Row>& rows) {
    std::vector<std::int32_t> samples;
    std::vector<std::int32_t> speculating;
    std::size_t at = 0;
    std::int32_t asked = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        Row& row = rows[i];
        Seat& seated = seat(row.slot);
        seated.fed = row.end();
        const bool decodes = i < index(plan.decode_count);
        const std::size_t begin = at;
        const std::int32_t proposes = plan.propose_counts.empty() ? 0 : plan.propose_counts[i];
        expect(proposes >= 0 && proposes <= proposal_length_max_,
               "device: a row is to have a longer proposal than any may");
        asked += proposes;
        for (; at < plan.sample_rows.size() && index(plan.sample_rows[at]) == i; ++at) {
            const auto behind =
                static_cast<std::int32_t>(decodes ? at - begin + 1 : row.tokens.size());
            expect(row.start + behind - static_cast<std::int32_t>(row.history.prompt) ==
                       plan.sample_positions[at],
                   "device: a row samples another position than it is at");
        }
        expect(proposes == 0 || at > begin, "device: a row that samples nothing is to propose");
        if (proposes > 0 || (decodes && row.tokens.size() > 1)) {
            seated.speculates = true;
            speculating.push_back(row.slot);
        }
        if (!decodes) {
            expect(at - begin <= 1, "device: a chunk samples more than its last token");
            if (at == begin) continue;
            const std::size_t end = index(row.end());
            seated.last = end < row.history.tokens.size() ? row.history.tokens[end]
                                                          : static_cast<std::int32_t>(end % 2);
            samples.push_back(*seated.last);
            seated.follows = end + 1;
            continue;
        }
        expect(at - begin == row.tokens.size(),
               "device: a decode row does not sample all its tokens");
        const std::vector<std::int32_t> found = verify(row);
        std::size_t right = 0;
        while (right + 1 < found.size() && row.tokens[right + 1] == found[right]) ++right;
        // Where a draft is right the sample says so; the first that is not is the last that counts.
        row.doubtful = static_cast<std::int32_t>(row.tokens.size() - 1 - right);
        seated.last = found[right];
        seated.fed = row.sure_end();
        seated.follows = index(row.sure_end()) + 1;
        samples.insert(samples.end(), found.begin(), found.end());
    }
    expect(at == plan.sample_rows.size(), "device: rows that sample are out of order");
    expect(asked <= step_proposals_max_, "device: a plan asks for more proposals than it may");
    speculating_.push_back(std::move(speculating));
    return samples;
}

// Right as far as it is told, and wrong from there on; how sure it is says nothing.
Proposals Device::propose(const control::Plan& plan, const Foresee& foresee) {
    Proposals found;
    if (plan.propose_counts.empty()) return found;
    found.starts.push_back(0);
    for (std::size_t i = 0; i < plan.propose_counts.size(); ++i) {
        const Seat& seated = seat(plan.row_slots[i]);
        const std::size_t asked = index(plan.propose_counts[i]);
        const Insight insight = asked > 0 && foresee ? foresee() : Insight{};
        const auto known = histories_->of(*seated.request).tokens;
        for (std::size_t j = 0; j + insight.fewer < asked; ++j) {
            const std::size_t at = seated.follows + j;
            const std::int32_t right = at < known.size() ? known[at] : 0;
            found.tokens.push_back(j < insight.right ? right : right + 1);
            found.chances.push_back(j % 2 == 0 ? 0.75F : 0.5F);
        }
        found.starts.push_back(static_cast<std::int32_t>(found.tokens.size()));
    }
    return found;
}

void Device::retire() {
    for (Storage& group : groups_) group.retire();
    for (const std::int32_t slot : speculating_.front()) seat(slot).speculates = false;
    speculating_.pop_front();
    --in_flight_;
}

Device::Transfer Device::transferred(std::int64_t request, bool complete) {
    const auto found = transfers_.find(request);
    expect(found != transfers_.end(), "device: no transfer of the request is under way");
    const Transfer transfer = found->second;
    transfers_.erase(found);
    const History history = histories_->of(request);
    // What is received is all but the last token, which was sampled elsewhere.
    const auto prompt = static_cast<std::int32_t>(history.prompt);
    const std::int32_t known =
        transfer.kind == control::TransferKind::kReceive ? prompt - 1 : prompt;
    for (Storage& group : groups_) {
        group.transferred(transfer.id, transfer.kind, complete, history, known);
    }
    return transfer;
}

void Device::scribble(const control::Fingerprint& live) {
    for (Storage& group : groups_) group.scribble(live);
}

void Device::describe(control::Fingerprint& fingerprint) const {
    for (const Storage& group : groups_) group.describe(fingerprint);
    auto& words = fingerprint.words;
    for (const control::SlotId slot : fingerprint.slots) {
        const Seat& seated = seats_[index(slot.value)];
        words.push_back(seated.request.value_or(kNothing));
        words.push_back(seated.last.value_or(-1));
        words.push_back(seated.fed);
        for (const Storage& group : groups_) {
            group.describe(fingerprint, slot.value, seated.fed, words);
        }
    }
    for (const auto& [request, transfer] : transfers_) {
        words.push_back(request);
        words.push_back(static_cast<std::int64_t>(transfer.kind));
    }
}

}  // namespace tokenspeed::proof
