// The conservation laws, checked by counting every owner. For tests: O(everything).

#include <string>

#include "scheduler.h"

namespace tokenspeed::control {

namespace {

struct Ledger {
    std::vector<std::int32_t> owners;      // by page
    std::vector<std::int32_t> references;  // by page
    std::vector<std::int32_t> seats;       // by slot

    void own(PageId page) { ++owners[static_cast<std::size_t>(page.value)]; }
    void refer(const std::vector<PageRef>& run) {
        for (const PageRef& ref : run) ++references[static_cast<std::size_t>(ref.id().value)];
    }
    void sit(const Slot& slot) { ++seats[static_cast<std::size_t>(slot.id().value)]; }

    void count(const Prefilling& request) {
        sit(request.slot);
        refer(request.sealed);
        if (request.tail) own(request.tail->id());
        for (const FreePage& page : request.promised) own(page.id());
    }
    void count(const Decoding& request) {
        sit(request.slot);
        refer(request.sealed);
        if (request.tail) own(request.tail->id());
    }
    void count(const Stepping& request) {
        sit(request.slot);
        refer(request.sealed);
        for (const auto& lease : request.lent) own(lease.id());
        for (const auto& lease : request.replaced) own(lease.id());
        for (const FreePage& page : request.promised) own(page.id());
        if (request.spare) own(request.spare->id());
    }
    void count(const Doomed& request) {
        sit(request.slot);
        refer(request.sealed);
        for (const auto& lease : request.lent) own(lease.id());
        for (const auto& lease : request.replaced) own(lease.id());
    }
};

[[noreturn]] void fail(const std::string& what) {
    throw EngineError("audit: " + what);
}

}  // namespace

void Scheduler::audit() const {
    if (const auto broken = store_.index.broken()) fail(*broken);

    const auto pages = static_cast<std::size_t>(store_.pages.total().value);
    Ledger ledger{std::vector<std::int32_t>(pages), std::vector<std::int32_t>(pages), {}};
    ledger.seats.resize(static_cast<std::size_t>(slots_max_));
    const auto count = [&](const auto& state) { ledger.count(state); };
    store_.pages.each_free([&](PageId page) { ledger.own(page); });
    store_.slots.each_free(
        [&](SlotId slot) { ++ledger.seats[static_cast<std::size_t>(slot.value)]; });
    prefilling_.each(count);
    decoding_.each(count);
    stepping_.each(count);
    doomed_.each(count);

    for (std::size_t i = 0; i < pages; ++i) {
        const auto references = store_.index.references(PageId(static_cast<std::int32_t>(i)));
        const std::int32_t owners = ledger.owners[i] + (references ? 1 : 0);
        if (owners != 1) {
            fail("page " + std::to_string(i) + " has " + std::to_string(owners) + " owners");
        }
        if (references.value_or(0) != ledger.references[i]) {
            fail("page " + std::to_string(i) + " counts " + std::to_string(references.value_or(0)) +
                 " references, but " + std::to_string(ledger.references[i]) + " are held");
        }
    }
    for (std::size_t i = 0; i < ledger.seats.size(); ++i) {
        if (ledger.seats[i] != 1) {
            fail("slot " + std::to_string(i) + " has " + std::to_string(ledger.seats[i]) +
                 " owners");
        }
    }

    for (std::size_t i = 0; i < order_.size(); ++i) {
        const Request& request = running(order_[i]);
        if (i > 0 && !(running(order_[i - 1]).order() < request.order())) {
            fail("the running requests are out of order");
        }
        const auto place = places_.find(request.id().value);
        if (place == places_.end() || place->second.slot != order_[i]) {
            fail("request " + std::to_string(request.id().value) + " is not where its id leads");
        }
    }
    std::size_t held = order_.size(), doomed = 0;
    doomed_.each([&](const Doomed&) { ++doomed; });
    if (doomed != doomed_count_) fail("doomed requests are miscounted");
    for (const auto& [order, queued] : queued_) {
        if (!queued) continue;
        ++held;
        const auto place = places_.find(queued->request->id().value);
        if (place == places_.end() || place->second.slot || place->second.order != order) {
            fail("request " + std::to_string(queued->request->id().value) +
                 " is queued where its id does not lead");
        }
    }
    for (const auto& arrival : arrivals_) held += std::holds_alternative<Queued>(arrival) ? 1 : 0;
    if (held + doomed != places_.size()) fail("an id leads nowhere");
    if (flights_.size() != ledger_.in_flight()) fail("flights and steps disagree");
}

}  // namespace tokenspeed::control
