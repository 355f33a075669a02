// What of all texts there is room for, and what a tenant's requests share.

#include <algorithm>
#include <new>

#include "drafter.h"

namespace tokenspeed::control {

namespace {

// Of a generation that is new to a request, so many of its last tokens are matched.
constexpr std::size_t kLittle = 64;

}  // namespace

// --- room ---------------------------------------------------------------------------------------

void Drafter::drop_oldest() noexcept {
    size_bytes_ -= kept_.back().size_bytes;
    kept_.pop_back();
}

// What is used least goes first: of requests that ended, then of what tenants share. False if there
// is no room all the same.
bool Drafter::make_room(std::size_t more) noexcept {
    const auto lacks = [&] { return size_bytes_ + more > memory_max_bytes_; };
    while (lacks() && !kept_.empty()) drop_oldest();
    while (lacks() && !shared_.empty()) {
        const auto stale = std::ranges::min_element(
            shared_, {}, [](const auto& entry) { return entry.second.used; });
        size_bytes_ -= stale->second.size_bytes;
        shared_.erase(stale);
    }
    return !lacks();
}

bool Drafter::make_room_for(const Memory& memory, std::size_t tokens) noexcept {
    const std::size_t most = memory.automaton.size_bytes_after(tokens);
    return make_room(most - std::min(most, memory.size_bytes));
}

// --- what a tenant's requests share -------------------------------------------------------------

// What those wrote that have ended, a piece of it.
void Drafter::share(std::size_t most) {
    std::list<Memory> telling;
    const auto untold = [](const Memory& memory) { return memory.untold > 0; };
    while (most > 0) {
        const auto found = std::ranges::find_if(kept_, untold);
        if (found == kept_.end()) return;
        // Room is made among the others.
        telling.splice(telling.begin(), kept_, found);
        Memory& memory = telling.front();
        std::size_t told = 0;
        try {
            told = tell(memory, std::min(most, memory.untold));
        } catch (const std::bad_alloc&) {
            // As where there is no room.
        }
        if (told == 0) memory.untold = 0;
        kept_.splice(kept_.begin(), telling);
        most -= told;
    }
}

// Tells the next tokens of those that are untold; how many there was room for.
std::size_t Drafter::tell(Memory& memory, std::size_t tokens) {
    const Owner owner{memory.tenant.value, memory.salt};
    const auto before = shared_.find(owner);
    const SuffixAutomaton& young = before == shared_.end() ? nothing_ : before->second.young;
    const std::size_t held = before == shared_.end() ? 0 : young.size_bytes();
    if (!make_room(young.size_bytes_after(tokens) + 2 * nothing_.size_bytes() - held)) return 0;
    const auto [place, fresh] = shared_.try_emplace(owner);
    Shared& shared = place->second;
    if (fresh) shared.generation = ++generations_;
    shared.used = plans_;
    try {
        if (shared.young.text().size() + tokens > kSharedTokensMax) {
            SuffixAutomaton next;
            shared.old = std::move(shared.young);
            shared.young = std::move(next);
            shared.generation = ++generations_;
        }
        const auto& text = memory.automaton.text();
        const std::size_t begin = text.size() - memory.untold;
        for (std::size_t at = begin; at < begin + tokens; ++at) shared.young.append(text[at]);
    } catch (const std::bad_alloc&) {
        size_bytes_ -= shared.size_bytes;
        shared_.erase(place);
        return 0;
    }
    memory.untold -= tokens;
    size_bytes_ -= shared.size_bytes;
    shared.size_bytes = shared.young.size_bytes() + shared.old.size_bytes();
    size_bytes_ += shared.size_bytes;
    return tokens;
}

// Matches what the request got since; of a generation that is new to it, its last tokens.
void Drafter::follow_shared(Reader& reader, const Request& request) noexcept {
    const auto found = shared_.find({request.tenant().value, request.salt()});
    if (found == shared_.end()) return;
    Shared& shared = found->second;
    Beside& beside = reader.beside;
    const std::size_t known = request.tokens().size();
    if (beside.generation != shared.generation) {
        beside.generation = shared.generation;
        beside.young = beside.old = {};
        beside.fed = known - std::min(known, kLittle);
    }
    const auto prompt = known - static_cast<std::size_t>(request.outputs().value);
    for (; beside.fed < known; ++beside.fed) {
        const std::int32_t token = request.tokens()[beside.fed];
        const Witness told = this->beside(reader, shared);
        if (beside.fed >= prompt && told.match.length > 0) {
            const bool right = told.automaton->after(told.match, 0) == token;
            beside.record.note(told.match.length, right, MatchRecord::kKeepOwn);
            beside_record_.note(told.match.length, right, MatchRecord::kKeepAll);
        }
        beside.young.feed(shared.young, token);
        beside.old.feed(shared.old, token);
    }
    if (this->beside(reader, shared).match.length > 0) shared.used = plans_;
}

// The longer match of the two generations, none where nothing comes after it.
Drafter::Witness Drafter::beside(const Reader& reader, const Shared& shared) const noexcept {
    Witness longest{&shared.young, {}, &reader.beside.record, &beside_record_, 0};
    const auto look = [&](const SuffixAutomaton& automaton, const auto& matcher) {
        const Occurrence match = matcher.found(automaton);
        const auto end = static_cast<std::size_t>(match.end) + 1;
        if (match.length <= longest.match.length || end >= automaton.text().size()) return;
        longest.automaton = &automaton;
        longest.match = match;
        longest.most = automaton.text().size() - end;
    };
    look(shared.young, reader.beside.young);
    look(shared.old, reader.beside.old);
    return longest;
}

}  // namespace tokenspeed::control
