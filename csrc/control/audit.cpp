// The conservation laws, checked by counting every owner. For tests: O(everything).

#include <string>

#include "scheduler.h"

namespace tokenspeed::control {

namespace {

std::size_t at(std::int32_t number) {
    return static_cast<std::size_t>(number);
}

// Owners and references of one group's pages, by page.
template <class G>
struct Counts {
    std::vector<std::int32_t> device, host, device_refs, host_refs;
};

struct Ledger {
    PerGroup<Counts> pages;
    std::vector<std::int32_t> links;  // by node
    std::vector<std::int32_t> seats;  // by slot

    template <class G, class P>
    void own(const P& page) {
        ++pages.of<G>().device[at(page.id().value)];
    }
    template <class G, class P>
    void refer(const P& ref) {
        ++pages.of<G>().device_refs[at(ref.id().value)];
    }
    void link(const Trail& trail) {
        for (const NodeRef& ref : trail) ++links[at(ref.id().value)];
    }

    template <class G>
    void count(const Resting<G>& group) {
        for (const auto& ref : group.sealed) refer<G>(ref);
        if (group.tail) own<G>(*group.tail);
        for (const auto& page : group.promised) own<G>(page);
    }
    template <class G>
    void count(const Flying<G>& group) {
        for (const auto& ref : group.sealed) refer<G>(ref);
        for (const auto& lease : group.lent) own<G>(lease);
        for (const auto& lease : group.replaced) own<G>(lease);
        for (const auto& page : group.promised) own<G>(page);
        if constexpr (!kPaged<G>) {
            for (const auto& saved : group.saved) own<G>(saved.page);
        }
    }
    template <class G>
    void count(const Loads<G>& group) {
        for (const auto& load : group.pages) {
            ++pages.of<G>().host_refs[at(load.source.id().value)];
            own<G>(load.target);
        }
    }
    template <class G>
    void count(const Arrivals<G>& group) {
        for (const auto& page : group) own<G>(page);
    }
    template <class G>
    void count(const Departures<G>& group) {
        for (const auto& ref : group.sealed) refer<G>(ref);
        for (const auto& page : group.tail) own<G>(page);
    }

    template <class G>
    void count(const Guessed<G>& group) {
        for (const auto& lease : group) own<G>(lease);
    }

    // A state: whatever of these parts it has.
    template <class State>
    void count_state(const State& state) {
        if constexpr (requires { state.slot; }) ++seats[at(state.slot.id().value)];
        if constexpr (requires { state.trail; }) link(state.trail);
        each_group([&]<class G>() {
            if constexpr (requires { state.pages; }) count(state.pages.template of<G>());
            if constexpr (requires { state.guesses; }) count<G>(state.guesses.template of<G>());
            if constexpr (requires { state.loads; }) count(state.loads.template of<G>());
            if constexpr (requires { state.arrivals; }) count(state.arrivals.template of<G>());
            if constexpr (requires { state.departures; }) count(state.departures.template of<G>());
        });
    }
};

[[noreturn]] void fail(const std::string& what) {
    throw EngineError("audit: " + what);
}

template <class Cache>
void check_pages(const Cache& cache, const std::vector<std::int32_t>& owned,
                 const std::vector<std::int32_t>& referred) {
    for (std::size_t i = 0; i < owned.size(); ++i) {
        const auto references = cache.references(typename Cache::Id(static_cast<std::int32_t>(i)));
        const std::int32_t owners = owned[i] + (references ? 1 : 0);
        if (owners != 1) {
            fail("page " + std::to_string(i) + " has " + std::to_string(owners) + " owners");
        }
        if (references.value_or(0) != referred[i]) {
            fail("page " + std::to_string(i) + " counts " + std::to_string(references.value_or(0)) +
                 " references, but " + std::to_string(referred[i]) + " are held");
        }
    }
}

}  // namespace

void Scheduler::audit() const {
    if (const auto broken = store_.index.broken()) fail(*broken);

    Ledger ledger{};
    ledger.links.resize(store_.index.tree().capacity());
    ledger.seats.resize(at(slots_max_));
    each_group([&]<class G>() {
        const auto& device = store_.index.tier<G, Device>();
        const auto& host = store_.index.tier<G, Host>();
        Counts<G>& counts = ledger.pages.of<G>();
        counts.device.resize(at(device.pool().total().value));
        counts.device_refs.resize(counts.device.size());
        counts.host.resize(at(host.pool().total().value));
        counts.host_refs.resize(counts.host.size());
        device.pool().each_free([&](auto page) { ++counts.device[at(page.value)]; });
        host.pool().each_free([&](auto page) { ++counts.host[at(page.value)]; });
        for (const auto& leaving : store_.index.leaving<G>()) {
            ++counts.host[at(leaving.target.id().value)];
            ++ledger.links[at(leaving.node.id().value)];
        }
        for (const Flight& flight : flights_) {
            for (const auto& stored : flight.stores.of<G>()) {
                ++counts.host[at(stored.target.id().value)];
                ++ledger.links[at(stored.node.id().value)];
            }
        }
    });
    store_.slots.each_free([&](SlotId slot) { ++ledger.seats[at(slot.value)]; });
    const auto count = [&](const auto& state) { ledger.count_state(state); };
    parked_.each(count);
    loading_.each(count);
    receiving_.each(count);
    prefilling_.each(count);
    decoding_.each(count);
    stepping_.each(count);
    verifying_.each(count);
    sending_.each(count);
    doomed_.each(count);
    cancelled_.each(count);

    each_group([&]<class G>() {
        const Counts<G>& counts = ledger.pages.of<G>();
        check_pages(store_.index.tier<G, Device>(), counts.device, counts.device_refs);
        check_pages(store_.index.tier<G, Host>(), counts.host, counts.host_refs);
    });
    for (std::size_t i = 0; i < ledger.links.size(); ++i) {
        const auto links = store_.index.tree().links(NodeId(static_cast<std::int32_t>(i)));
        if (links.value_or(0) != ledger.links[i]) {
            fail("node " + std::to_string(i) + " counts " + std::to_string(links.value_or(0)) +
                 " links, but " + std::to_string(ledger.links[i]) + " are held");
        }
    }
    for (std::size_t i = 0; i < ledger.seats.size(); ++i) {
        if (ledger.seats[i] != 1) {
            fail("slot " + std::to_string(i) + " has " + std::to_string(ledger.seats[i]) +
                 " owners");
        }
    }

    const auto leads = [&](RequestId id, const std::optional<SlotId>& slot, const Order& order) {
        const auto place = places_.find(id.value);
        if (place == places_.end() || place->second.slot != slot || place->second.order != order) {
            fail("request " + std::to_string(id.value) + " is not where its id leads");
        }
    };
    std::size_t held = 0;
    const auto seated = [&](const auto& state) {
        ++held;
        if constexpr (requires { state.request; }) {
            leads(state.request->id(), state.slot.id(), state.request->order());
        } else {
            const auto place = places_.find(state.id.value);
            if (place == places_.end()) fail("an ended request that holds pages has no id");
            leads(state.id, state.slot.id(), place->second.order);
        }
    };
    loading_.each(seated);
    receiving_.each(seated);
    prefilling_.each(seated);
    decoding_.each(seated);
    stepping_.each(seated);
    verifying_.each(seated);
    if (held - loading_.count() - receiving_.count() != order_.size()) {
        fail("the running requests are not those in order");
    }
    sending_.each(seated);
    doomed_.each(seated);
    cancelled_.each(seated);
    const auto lined_up = [&](const auto& state) {
        ++held;
        leads(state.request->id(), std::nullopt, state.request->order());
    };
    queued_.each(lined_up);
    parked_.each(lined_up);
    for (const auto& arrival : arrivals_) held += std::holds_alternative<Queued>(arrival) ? 1 : 0;
    if (held != places_.size()) fail("an id leads nowhere");

    const auto asked = [&](SlotId slot) {
        return std::ranges::count_if(flights_, [&](const Flight& flight) {
            return std::ranges::any_of(
                flight.rows, [&](const Row& row) { return row.slot == slot && row.propose > 0; });
        });
    };
    stepping_.each([&](const Stepping& state) {
        if (asked(state.slot.id()) != (state.proposes ? 1 : 0)) {
            fail("a request in flight does not know what its steps propose");
        }
    });
    decoding_.each([&](const Decoding& state) {
        const Proposal& kept = state.proposal;
        if (kept.tokens.size() != kept.chances.size() ||
            kept.tokens.size() > static_cast<std::size_t>(proposal_length_max_)) {
            fail("a request keeps a proposal that nobody asked for");
        }
    });

    for (std::size_t i = 1; i < order_.size(); ++i) {
        if (!(running(order_[i - 1]).order() < running(order_[i]).order())) {
            fail("the running requests are out of order");
        }
    }
    const std::size_t travelling =
        loading_.count() + receiving_.count() + sending_.count() + cancelled_.count();
    if (travelling != transfers_.under_way()) fail("transfers and their requests disagree");
    if (flights_.size() != ledger_.in_flight()) fail("flights and steps disagree");
}

}  // namespace tokenspeed::control
