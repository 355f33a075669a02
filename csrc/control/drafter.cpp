#include "drafter.h"

#include <algorithm>
#include <new>
#include <numeric>

#include "draft_lengths.h"

namespace tokenspeed::control {

namespace {

// The longest match of each class; the last class has no end.
constexpr std::array<std::int32_t, MatchRecord::kLengths - 1> kClassEnds{1,  2,  3,  4,  6, 8,
                                                                         12, 16, 24, 32, 64};
// What a match of each class is worth before anything was seen, and how many tokens that counts.
// Low, as seeing costs nothing and believing does.
constexpr std::array<double, MatchRecord::kLengths> kFirstChances{.03, .06, .1, .2, .3,  .4,
                                                                  .5,  .6,  .7, .8, .85, .9};
constexpr double kFirstWeight = 4;
// As many of its own tokens outweigh what others' matches were worth.
constexpr double kOthersWeight = 2;
// What is less likely is never worth its time.
constexpr double kChanceMin = 0.05;

// A request this little behind is read to its end before others go on with their prompts.
constexpr std::size_t kLittle = 64;
// What is kept of a request that ended, and what a prompt must share with it to go on from there.
constexpr std::size_t kWorthKeeping = 64;
constexpr std::size_t kKeptMax = 512;

// Tokens a draft must be expected to bring for a request in flight to be left out of a plan, and
// how many it then goes on without, if no draft came of it.
constexpr double kRestFor = 3;
constexpr std::int32_t kRestAgain = 64;

// Likely drafts that were too dear are tried all the same, a token each, so that a price learned
// wrong is learned again: after so many steps, each time twice as many.
constexpr std::int64_t kPatience = 256, kPatienceMax = 8192;
constexpr double kLikely = 0.5;
// Of a step, the least that a drafted token is taken to add.
constexpr double kPriceShareMin = 0.002;

double expected(const std::vector<float>& chances) {
    return std::accumulate(chances.begin(), chances.end(), 0.0);
}

// A step that is too long anyhow may be so long for each token that comes of it.
std::optional<double> floor_of(const DraftSource::Step& step, double step_us) {
    if (!step.limit_us) return std::nullopt;
    return std::max(*step.limit_us, step_us);
}

}  // namespace

// --- what matches were worth --------------------------------------------------------------------

std::size_t MatchRecord::length_class(std::int32_t length) noexcept {
    return static_cast<std::size_t>(std::ranges::lower_bound(kClassEnds, length) -
                                    kClassEnds.begin());
}

void MatchRecord::note(std::int32_t length, bool right, double keep) noexcept {
    const std::size_t place = length_class(length);
    tries_[place] = tries_[place] * keep + 1;
    hits_[place] = hits_[place] * keep + (right ? 1 : 0);
}

double MatchRecord::chance(std::int32_t length, double prior, double weight) const noexcept {
    const std::size_t place = length_class(length);
    return (hits_[place] + prior * weight) / (tries_[place] + weight);
}

double Drafter::chance(const Witness& witness, std::int32_t length) noexcept {
    const double first = kFirstChances[MatchRecord::length_class(length)];
    const double others = witness.others->chance(length, first, kFirstWeight);
    return witness.own->chance(length, others, kOthersWeight);
}

// --- reading ------------------------------------------------------------------------------------

void Drafter::follow(std::span<const Request* const> running) {
    ++plans_;
    proposer_.follow(running);
    std::size_t left = kTokensPerPlan;
    for (const bool behind : {false, true}) {
        for (const Request* request : running) {
            Reader& reader = reader_of(*request);
            const std::size_t lag = request->tokens().size() - reader.read;
            if ((lag > kLittle) != behind) continue;
            left -= read(reader, *request, std::min(lag, left));
            if (reader.read == request->tokens().size()) follow_shared(reader, *request);
        }
    }
    share(left);
}

Drafter::Reader& Drafter::reader_of(const Request& request) {
    const auto [place, fresh] = readers_.try_emplace(request.id().value);
    Reader& reader = place->second;
    if (!fresh) return reader;
    try {
        if (!inherit(reader, request)) {
            reader.memory.push_back({request.tenant(), request.salt(), SuffixAutomaton(), 0, 0});
        }
        Memory& memory = reader.memory.front();
        const std::size_t tokens =
            memory.automaton.text().size() + request.tokens().size() - reader.read;
        const std::size_t wanted = tokens + tokens / 8 + kWorthKeeping;
        if (!make_room_for(memory, wanted - memory.automaton.text().size())) {
            forget(reader);
            return reader;
        }
        memory.automaton.reserve(wanted);
        count(memory);
    } catch (const std::bad_alloc&) {
        forget(reader);
    }
    return reader;
}

// A draft is a convenience: where there is no memory the request goes without.
void Drafter::forget(Reader& reader) noexcept {
    for (const Memory& memory : reader.memory) size_bytes_ -= memory.size_bytes;
    reader.memory.clear();
}

// Takes over what is kept of an earlier turn.
bool Drafter::inherit(Reader& reader, const Request& request) {
    auto best = kept_.end();
    std::size_t shared = 0;
    for (auto kept = kept_.begin(); kept != kept_.end(); ++kept) {
        if (kept->tenant != request.tenant() || kept->salt != request.salt()) continue;
        const auto& text = kept->automaton.text();
        const auto ends = std::ranges::mismatch(text, request.tokens());
        const auto alike = static_cast<std::size_t>(ends.in1 - text.begin());
        if (alike <= shared || alike < kWorthKeeping || 2 * alike < text.size()) continue;
        best = kept;
        shared = alike;
    }
    if (best == kept_.end()) return false;
    reader.memory.splice(reader.memory.begin(), kept_, best);
    // Where another ending follows, the last tokens before it are read again, so that they match.
    const bool ends = shared == reader.memory.front().automaton.text().size();
    reader.memory.front().untold = 0;
    reader.read = ends ? shared : shared - std::min(shared, kLittle);
    return true;
}

// Reads up to `most` tokens; how many. What was sampled shows what the match before it was worth.
std::size_t Drafter::read(Reader& reader, const Request& request, std::size_t most) {
    if (most == 0 || reader.memory.empty()) return 0;
    Memory& memory = reader.memory.front();
    SuffixAutomaton& automaton = memory.automaton;
    if (!make_room_for(memory, most)) {
        forget(reader);
        return 0;
    }
    const auto prompt = request.tokens().size() - static_cast<std::size_t>(request.outputs().value);
    try {
        for (const std::size_t end = reader.read + most; reader.read < end; ++reader.read) {
            const std::int32_t token = request.tokens()[reader.read];
            const Occurrence match = automaton.longest();
            if (reader.read >= prompt && match.length > 0) {
                const bool right = automaton.after(match, 0) == token;
                reader.record.note(match.length, right, MatchRecord::kKeepOwn);
                record_.note(match.length, right, MatchRecord::kKeepAll);
            }
            automaton.append(token);
            if (reader.read >= prompt) ++memory.untold;
        }
    } catch (const std::bad_alloc&) {
        forget(reader);
        return 0;
    }
    count(memory);
    return most;
}

void Drafter::count(Memory& memory) noexcept {
    size_bytes_ -= memory.size_bytes;
    memory.size_bytes = memory.automaton.size_bytes();
    size_bytes_ += memory.size_bytes;
}

// The longest match there is; the request's own of two alike.
Drafter::Witness Drafter::witness(const Reader& reader, const Request& request) const noexcept {
    const SuffixAutomaton& own = reader.memory.front().automaton;
    const Witness longest{&own, own.longest(), &reader.record, &record_, kLongest};
    const auto found = shared_.find({request.tenant().value, request.salt()});
    if (found == shared_.end() || reader.beside.generation != found->second.generation ||
        reader.beside.fed != request.tokens().size()) {
        return longest;
    }
    const Witness other = beside(reader, found->second);
    return other.match.length > longest.match.length ? other : longest;
}

void Drafter::ended(RequestId request) noexcept {
    proposer_.ended(request);
    const auto found = readers_.find(request.value);
    if (found == readers_.end()) return;
    std::list<Memory>& memory = found->second.memory;
    if (!memory.empty() && memory.front().automaton.text().size() >= kWorthKeeping) {
        kept_.splice(kept_.begin(), memory);
        while (kept_.size() > kKeptMax) drop_oldest();
    }
    forget(found->second);
    readers_.erase(found);
}

// --- drafting -----------------------------------------------------------------------------------

// Nobody whose last token is not read yet.
const Drafter::Reader* Drafter::ready(const Request& request) const noexcept {
    const auto found = readers_.find(request.id().value);
    if (found == readers_.end() || found->second.memory.empty()) return nullptr;
    return found->second.read == request.tokens().size() ? &found->second : nullptr;
}

// Of each token that the longest match proposes, the chance that it and all before it are right.
std::vector<float> Drafter::chances(const Request& request, std::size_t most) const {
    std::vector<float> found;
    const Reader* reader = ready(request);
    if (reader == nullptr) return found;
    const Witness told = witness(*reader, request);
    if (told.match.length == 0) return found;
    double all = 1;
    for (std::size_t i = 0; i < std::min({most, kLongest, told.most}); ++i) {
        all *= chance(told, told.match.length + static_cast<std::int32_t>(i));
        if (all < kChanceMin) break;
        found.push_back(static_cast<float>(all));
    }
    return found;
}

void Drafter::draft(std::span<Row> rows, const Step& step, const StepTimeModel& model) {
    if (!model.trusted()) return;
    std::vector<std::vector<float>> chances;
    std::vector<bool> proposed(rows.size());
    chances.reserve(rows.size());
    float likeliest = 0;
    std::size_t likeliest_row = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const auto most = static_cast<std::size_t>(rows[i].most.value);
        chances.push_back(this->chances(*rows[i].request, most));
        const double rival = expected(chances[i]);
        auto others = proposer_.weigh(*rows[i].request, *rows[i].proposal, most, rival);
        proposed[i] = expected(others) > rival;
        if (proposed[i]) chances[i] = std::move(others);
        if (chances[i].empty() || chances[i].front() <= likeliest) continue;
        likeliest = chances[i].front();
        likeliest_row = i;
    }
    const double step_us = model.predict_us(step.work);
    const double token_us = std::max(model.draft_token_us(step.prompts), kPriceShareMin * step_us);
    const auto most = static_cast<std::size_t>(
        std::min<std::int64_t>(step.most.value, model.draft_tokens_within_reach()));
    std::vector<std::size_t> lengths =
        draft_lengths(chances, static_cast<std::size_t>(step.work.decode_rows),
                      {step_us, token_us, floor_of(step, step_us)}, most);
    if (std::ranges::any_of(lengths, [](std::size_t length) { return length > 0; })) {
        dear_for_ = 0;
        patience_ = kPatience;
    } else if (likeliest >= kLikely && !step.limit_us && ++dear_for_ >= patience_) {
        lengths[likeliest_row] = 1;
        dear_for_ = 0;
        patience_ = std::min(2 * patience_, kPatienceMax);
    }
    for (std::size_t i = 0; i < rows.size(); ++i) {
        rows[i].expected += std::accumulate(
            chances[i].begin(), chances[i].begin() + static_cast<std::ptrdiff_t>(lengths[i]), 0.0);
        if (proposed[i]) {
            proposer_.drafted(*rows[i].request, lengths[i]);
            const auto begin = rows[i].proposal->tokens.begin();
            rows[i].draft.assign(begin, begin + static_cast<std::ptrdiff_t>(lengths[i]));
            continue;
        }
        const Reader* reader = ready(*rows[i].request);
        if (reader == nullptr) continue;
        const Witness told = witness(*reader, *rows[i].request);
        for (std::size_t at = 0; at < lengths[i]; ++at) {
            rows[i].draft.push_back(told.automaton->after(told.match, at));
        }
        Reader& rested = readers_.find(rows[i].request->id().value)->second;
        if (rested.rested && lengths[i] == 0) {
            rested.rests_again_at = rows[i].request->known() + TokenCount(kRestAgain);
        }
        rested.rested = false;
    }
}

void Drafter::propose(std::span<Ask> rows, const Step& step, const StepTimeModel& model) {
    proposer_.ask(rows, step, model);
}

bool Drafter::wants_rest(const Request& request) {
    const auto found = readers_.find(request.id().value);
    if (found == readers_.end() || request.known() < found->second.rests_again_at) return false;
    double expected = 0;
    for (const float chance : chances(request, kLongest)) expected += chance;
    found->second.rested = expected >= kRestFor;
    return found->second.rested;
}

}  // namespace tokenspeed::control
