#include "requests.h"

#include <algorithm>
#include <cassert>
#include <limits>

#include "room.h"

namespace tokenspeed::control {

namespace {

std::size_t size_of(TokenCount page_size) {
    return static_cast<std::size_t>(page_size.value);
}

TokenCount clamp(std::int64_t count) {
    return TokenCount(static_cast<std::int32_t>(
        std::min<std::int64_t>(count, std::numeric_limits<std::int32_t>::max())));
}

void give_back(std::optional<OpenPage>&& tail, Store& store) noexcept {
    if (tail) store.pages.give(std::move(*tail));
}

void give_back(std::vector<FreePage>&& promised, Store& store) noexcept {
    for (FreePage& page : promised) store.pages.give(std::move(page));
}

// The parts of a request that rests in a slot.
void clear_out(Prefilling& request, Store& store) noexcept {
    give_back(std::move(request.tail), store);
    give_back(std::move(request.promised), store);
    store.index.release(std::move(request.sealed));
    store.slots.give(std::move(request.slot));
}

void clear_out(Decoding& request, Store& store) noexcept {
    give_back(std::move(request.tail), store);
    store.index.release(std::move(request.sealed));
    store.slots.give(std::move(request.slot));
}

// Moves the leases a chunk writes to `step`, and lends promised pages as far as it reaches.
void lend_chunk(Stepping& request, TokenCount chunk, StepId step) noexcept {
    const std::size_t page_size = size_of(request.request->page_size());
    const std::size_t sealed = request.sealed.size();
    auto& lent = request.lent;
    const auto first = static_cast<std::size_t>(request.fed.value) / page_size;
    const auto last = static_cast<std::size_t>((request.fed + chunk).value - 1) / page_size;
    for (std::size_t index = first; index <= last; ++index) {
        if (index < sealed + lent.size()) {
            InFlight<OpenPage>& lease = lent[index - sealed];
            if (lease.until() < step) lease = extend(std::move(lease), step);
        } else if (!request.promised.empty()) {
            lent.push_back(lend(open(std::move(request.promised.back())), step));
            request.promised.pop_back();
        } else {
            lent.push_back(lend(open(std::move(*request.spare)), step));
            request.spare.reset();
        }
    }
    request.fed += chunk;
    if (request.fed == request.request->known() + request.pending) request.pending += TokenCount(1);
    request.last = step;
}

}  // namespace

// --- Request ------------------------------------------------------------------------------------

Request::Request(Submission&& wish, Order order, TokenCount page_size)
    : wish_(std::move(wish)),
      order_(order),
      page_size_(page_size),
      prompt_(static_cast<std::int32_t>(wish_.prompt.size())),
      tokens_(std::move(wish_.prompt)) {
    std::ranges::sort(wish_.stop_token_ids);
    make_room_for(hashes_, tokens_.size() / size_of(page_size_) + 1);
    hash_full_pages();
}

PageContent Request::page(std::size_t index) const noexcept {
    return {hashes_[index], wish_.salt,
            std::span(tokens_).subspan(index * size_of(page_size_), size_of(page_size_))};
}

void Request::reserve_token() {
    make_room_for(tokens_, 1);
    make_room_for(hashes_, 1);
}

void Request::append(std::int32_t token) noexcept {
    tokens_.push_back(token);
    hash_full_pages();
}

void Request::hash_full_pages() noexcept {
    const std::size_t size = size_of(page_size_);
    while ((hashes_.size() + 1) * size <= tokens_.size()) {
        const Hash128 before = hashes_.empty() ? hash_root(wish_.salt) : hashes_.back();
        hashes_.push_back(
            hash_page(before, std::span(tokens_).subspan(hashes_.size() * size, size)));
    }
}

bool Request::exhausted(TokenCount pending, TokenCount context_max) const noexcept {
    return outputs() + pending >= clamp(wish_.max_new_tokens) || known() + pending >= context_max;
}

std::optional<FinishReason> Request::end(TokenCount context_max) const noexcept {
    // The sampler gives no stop token before min_new_tokens others; one that came all the same
    // (its position is outputs - 1) does not stop.
    if (outputs() > clamp(wish_.min_new_tokens) &&
        std::ranges::binary_search(wish_.stop_token_ids, tokens_.back())) {
        return FinishReason::kStop;
    }
    if (exhausted(TokenCount(0), context_max)) return FinishReason::kLength;
    return std::nullopt;
}

void Request::admitted(TokenCount cached) noexcept {
    if (!cached_) cached_ = cached;
    known_at_admission_ = known();
}

// --- admission ----------------------------------------------------------------------------------

std::variant<Admission, Admission::Refused> Admission::probe(const Queued& queued,
                                                             PageCount reserve, Store& store) {
    const Request& request = *queued.request;
    const PageCount whole = pages_for(request.known(), request.page_size());
    // At least one token is computed, so that there are logits to sample from.
    const std::size_t reusable = (request.tokens().size() - 1) / size_of(request.page_size());
    Admission ticket;
    ticket.cached_.reserve(static_cast<std::size_t>(whole.value));
    ticket.promised_.reserve(static_cast<std::size_t>(whole.value));

    const PageCount before = store.available();
    store.index.match(std::span(request.hashes()).first(reusable), request.tokens(), request.salt(),
                      ticket.cached_);
    const PageCount missing = whole - PageCount(static_cast<std::int32_t>(ticket.cached_.size()));
    if (missing + reserve > store.available()) {
        const PageCount wanted = missing + (before - store.available());
        cancel(std::move(ticket), store);
        return Refused{wanted};
    }
    while (ticket.promised_.size() < static_cast<std::size_t>(missing.value)) {
        ticket.promised_.push_back(*store.take());
    }
    return ticket;
}

void Admission::cancel(Admission&& ticket, Store& store) noexcept {
    store.index.release(std::move(ticket.cached_));
    give_back(std::move(ticket.promised_), store);
}

Prefilling admit(Queued&& queued, Admission&& ticket, Slot&& slot) noexcept {
    const TokenCount cached(static_cast<std::int32_t>(ticket.cached_.size()) *
                            queued.request->page_size().value);
    queued.request->admitted(cached);
    return {std::move(queued.request),   std::move(slot), std::move(ticket.cached_), std::nullopt,
            std::move(ticket.promised_), cached};
}

// --- launching ----------------------------------------------------------------------------------

Stepping launch(Prefilling&& request, StepId step, TokenCount chunk, Berth&& berth) noexcept {
    Stepping flying{std::move(request.request),
                    std::move(request.slot),
                    std::move(request.sealed),
                    std::move(berth.lent_),
                    {},
                    std::move(request.promised),
                    std::nullopt,
                    request.fed,
                    TokenCount(0),
                    step};
    if (request.tail) flying.lent.push_back(lend(std::move(*request.tail), step));
    lend_chunk(flying, chunk, step);
    return flying;
}

Stepping launch(Decoding&& request, StepId step, Berth&& berth) noexcept {
    assert(request.tail && "a decode row needs a page to write to");
    const TokenCount fed = request.request->known() - TokenCount(1);
    Stepping flying{std::move(request.request),
                    std::move(request.slot),
                    std::move(request.sealed),
                    std::move(berth.lent_),
                    {},
                    {},
                    std::nullopt,
                    fed,
                    TokenCount(0),
                    step};
    flying.lent.push_back(lend(std::move(*request.tail), step));
    lend_chunk(flying, TokenCount(1), step);
    return flying;
}

Stepping extend(Stepping&& request, StepId next, TokenCount chunk, Berth&& berth) noexcept {
    std::vector<InFlight<OpenPage>> lent = std::move(berth.lent_);
    for (InFlight<OpenPage>& lease : request.lent) lent.push_back(std::move(lease));
    request.lent = std::move(lent);
    lend_chunk(request, chunk, next);
    return std::move(request);
}

bool needs_page(const Decoding& request) noexcept {
    return !request.tail;
}

bool needs_page(const Stepping& request) noexcept {
    const auto pages = request.sealed.size() + request.lent.size() + request.promised.size() +
                       (request.spare ? 1 : 0);
    return static_cast<std::size_t>(request.fed.value) ==
           pages * size_of(request.request->page_size());
}

void grow(Decoding& request, FreePage&& page) noexcept {
    request.tail.emplace(open(std::move(page)));
}

void grow(Stepping& request, FreePage&& page) noexcept {
    request.spare.emplace(std::move(page));
}

// --- landing ------------------------------------------------------------------------------------

void reserve_landing(Stepping& request, std::vector<Swap>& swaps) {
    make_room_for(request.sealed, request.lent.size());
    make_room_for(request.replaced, request.lent.size());
    make_room_for(swaps, request.lent.size());
}

Landed land(Stepping&& request, const Retired& done, TokenCount written, Store& store,
            std::vector<Swap>& swaps) {
    const std::size_t page_size = size_of(request.request->page_size());
    const auto back = static_cast<std::size_t>(
        std::ranges::find_if(request.lent,
                             [&](const auto& lease) { return !done.covers(lease.until()); }) -
        request.lent.begin());
    const bool flies_on = !done.covers(request.last);

    std::optional<OpenPage> tail;
    for (std::size_t i = 0; i < back; ++i) {
        OpenPage page = reclaim(std::move(request.lent[i]), done);
        const std::size_t index = request.sealed.size();
        if ((index + 1) * page_size > static_cast<std::size_t>(written.value)) {
            tail.emplace(std::move(page));
            break;
        }
        auto [ref, duplicate] = store.index.shelve(
            seal(std::move(page), done), request.sealed.empty() ? nullptr : &request.sealed.back(),
            request.request->page(index));
        request.sealed.push_back(std::move(ref));
        if (!duplicate) continue;
        swaps.push_back({static_cast<std::int32_t>(index), request.sealed.back().id()});
        if (flies_on) {
            request.replaced.push_back(lend(std::move(*duplicate), request.last));
        } else {
            store.pages.give(std::move(*duplicate));
        }
    }
    request.lent.erase(request.lent.begin(),
                       request.lent.begin() + static_cast<std::ptrdiff_t>(back));
    std::erase_if(request.replaced, [&](InFlight<SealedPage>& lease) {
        if (!done.covers(lease.until())) return false;
        store.pages.give(reclaim(std::move(lease), done));
        return true;
    });

    if (flies_on) {
        assert(!tail && "a step in flight writes the page a retired one left in part");
        return Landed(std::move(request));
    }
    if (request.fed < request.request->known_at_admission()) {
        return Prefilling{std::move(request.request),  std::move(request.slot),
                          std::move(request.sealed),   std::move(tail),
                          std::move(request.promised), request.fed};
    }
    // Grown for a step that was not launched after all: the page is the next token's.
    if (request.spare) {
        assert(!tail);
        tail.emplace(open(std::move(*request.spare)));
    }
    return Decoding{std::move(request.request), std::move(request.slot), std::move(request.sealed),
                    std::move(tail)};
}

Ended land(Doomed&& request, const Retired& done, Store& store) noexcept {
    if (!done.covers(request.last)) return Ended(std::move(request));
    for (auto& lease : request.lent) store.pages.give(reclaim(std::move(lease), done));
    for (auto& lease : request.replaced) store.pages.give(reclaim(std::move(lease), done));
    store.index.release(std::move(request.sealed));
    store.slots.give(std::move(request.slot));
    return Finished{request.id, request.reason};
}

// --- leaving ------------------------------------------------------------------------------------

Queued retract(Prefilling&& request, Store& store) noexcept {
    clear_out(request, store);
    request.request->retracted();
    return Queued(std::move(request.request));
}

Queued retract(Decoding&& request, Store& store) noexcept {
    clear_out(request, store);
    request.request->retracted();
    return Queued(std::move(request.request));
}

Finished finish(Queued&& request, FinishReason reason) noexcept {
    const RequestBox box = std::move(request.request);
    return {box->id(), reason};
}

Finished finish(Prefilling&& request, FinishReason reason, Store& store) noexcept {
    clear_out(request, store);
    const RequestBox box = std::move(request.request);
    return {box->id(), reason};
}

Finished finish(Decoding&& request, FinishReason reason, Store& store) noexcept {
    clear_out(request, store);
    const RequestBox box = std::move(request.request);
    return {box->id(), reason};
}

Doomed doom(Stepping&& request, FinishReason reason, Store& store) noexcept {
    give_back(std::move(request.promised), store);
    if (request.spare) store.pages.give(std::move(*request.spare));
    const RequestBox box = std::move(request.request);
    return {box->id(),
            reason,
            std::move(request.slot),
            std::move(request.sealed),
            std::move(request.lent),
            std::move(request.replaced),
            request.last};
}

}  // namespace tokenspeed::control
