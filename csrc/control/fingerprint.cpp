// The fingerprint of a scheduler's state. For tests: O(everything).
//
// Each part is written with its length, so that no two states run into one. Two schedulers of one
// fingerprint do the same from here on, as far as an explorer can see that keeps time standing
// still, holds no floor, sets no queue timeout and submits fewer than eight requests (it checks
// that it does). What is in, and in which form:
//
//   requests       who they are, what they know, how far they are, pages and slots by first mention
//   their order    as ranks: numbers of arrivals only grow
//   transfers      that are under way, by the request's slot; steps in flight, with their stores
//   fair turns     what each line was given beyond the least given at its priority: shares are
//                  compared and raised to each other, so that only differences matter
//   retraction     what a request knew when it was seated last, and how often it was retracted, up
//                  to as many times as make a difference
//   the index      its content, references, and for each lane what would be dropped in which order
//   sessions       branches, where they left others, and the pages they lost (ghosts), as these
//                  decide whose the next prompt is; under the session policy also their waits and
//                  all that was learned of times away
//   what is said   next: page tables, loads, handovers, endings
//
// Left out is:
//
//   step times     no time passes, and the model takes no step into account that took none
//   floor          its patience and when the last step returned are read only where a floor is held
//   deadlines      are kept only where there is a queue timeout, as is `full_` between plans
//   answers        their lengths foretell nothing before the eighth
//   openings       and the order of siblings decide only what statistics say, as do all counters
//   the draft      every plan starts it afresh

#include "fingerprint.h"

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>

#include "scheduler.h"

namespace tokenspeed::control {

namespace {

constexpr std::int64_t kNothing = std::numeric_limits<std::int64_t>::min();

// Names numbers by the order in which they are mentioned.
class Names {
  public:
    std::int64_t name(std::int32_t number, std::vector<std::int32_t>& mentioned) {
        const auto place = static_cast<std::size_t>(number);
        if (names_.size() <= place) names_.resize(place + 1, kNothing);
        if (names_[place] == kNothing) {
            names_[place] = static_cast<std::int64_t>(mentioned.size());
            mentioned.push_back(number);
        }
        return names_[place];
    }

  private:
    std::vector<std::int64_t> names_;
};

template <class G>
constexpr std::size_t place_of() {
    return static_cast<std::size_t>(G::kKind);
}

class Scribe {
  public:
    explicit Scribe(StepId oldest) : oldest_(oldest) { result_.words.reserve(512); }

    Fingerprint result() && {
        for (const std::int32_t slot : slots_) result_.slots.push_back(SlotId(slot));
        return std::move(result_);
    }

    std::vector<std::int64_t>& words() { return result_.words; }
    void word(std::int64_t value) { result_.words.push_back(value); }
    void size(std::size_t value) { word(static_cast<std::int64_t>(value)); }
    void slot(SlotId slot) { word(slot_names_.name(slot.value, slots_)); }
    template <class G>
    void page(PageId<G, Device> page) {
        word(device_names_[place_of<G>()].name(page.value, result_.pages[place_of<G>()]));
    }
    template <class G>
    void page(PageId<G, Host> page) {
        word(host_names_[place_of<G>()].name(page.value, result_.host_pages[place_of<G>()]));
    }
    void node(NodeId node) { word(node_names_.name(node.value, nodes_)); }
    void trail(const Trail& trail) {
        size(trail.size());
        for (const NodeRef& ref : trail) node(ref.id());
    }
    template <class G, class Lease>
    void leases(const std::vector<Lease>& leases) {
        size(leases.size());
        for (const auto& lease : leases) {
            page<G>(lease.id());
            word(lease.until().value - oldest_.value);
        }
    }
    template <class G, class Pages>
    void run(const Pages& pages) {
        size(pages.size());
        for (const auto& held : pages) page<G>(held.id());
    }

    // `blank` says that the tail holds nothing yet.
    template <class G>
    void part(const Resting<G>& pages, bool blank) {
        word(pages.first);
        run<G>(pages.sealed);
        word(pages.tail ? (blank ? 1 : 2) : 0);
        if (pages.tail && !blank) page<G>(pages.tail->id());
        size(pages.promised.size());
    }
    template <class G>
    void part(const Flying<G>& pages) {
        word(pages.first);
        run<G>(pages.sealed);
        leases<G>(pages.lent);
        leases<G>(pages.replaced);
        size(pages.promised.size());
        size(pages.saved.size());
        if constexpr (!kPaged<G>) {
            for (const Checkpoint& saved : pages.saved) {
                word(saved.index);
                page<G>(saved.page.id());
                word(saved.page.until().value - oldest_.value);
            }
        }
    }
    template <class G>
    void part(const Loads<G>& loads) {
        size(loads.pages.size());
        for (const Inbound<G>& load : loads.pages) {
            word(load.index);
            page<G>(load.source.id());
            page<G>(load.target.id());
        }
    }
    template <class G>
    void part(const Departures<G>& departures) {
        word(departures.first);
        run<G>(departures.sealed);
        run<G>(departures.tail);
    }

    // What is in the tokens is decided by who asked for them and how many there are.
    void request(const Request& request) {
        word(request.id().value);
        word(request.known().value);
        word(std::min(request.retractions(), kDoublingsMax));
        word(request.was_admitted() ? request.cached().value : kNothing);
        word(request.known_at_admission().value);
        word(request.receives() ? 1 : 0);
        word(request.recomputes() ? 1 : 0);
    }

    // A state: whatever of these parts it has.
    template <class State>
    void state(std::int64_t tag, const State& state) {
        word(tag);
        if constexpr (requires { state.slot; }) slot(state.slot.id());
        if constexpr (requires { state.request; }) {
            request(*state.request);
        } else {
            word(state.id.value);
        }
        if constexpr (requires { state.reason; }) word(static_cast<std::int64_t>(state.reason));
        if constexpr (requires { state.fed; }) word(state.fed.value);
        if constexpr (requires { state.pending; }) word(state.pending.value);
        if constexpr (requires { state.last; }) word(state.last.value - oldest_.value);
        if constexpr (requires { state.trail; }) trail(state.trail);
        if constexpr (requires { state.draft; }) result_.add(state.draft);
        if constexpr (requires { state.proposal; }) result_.add(state.proposal);
        each_group([&]<class G>() {
            if constexpr (requires { state.guesses; }) leases<G>(state.guesses.template of<G>());
            if constexpr (requires { state.pages; }) {
                const auto& pages = state.pages.template of<G>();
                if constexpr (requires { pages.tail; }) {
                    part(pages, blank_tail<G>(state));
                } else {
                    part(pages);
                }
            }
            if constexpr (requires { state.loads; }) part(state.loads.template of<G>());
            if constexpr (requires { state.arrivals; }) run<G>(state.arrivals.template of<G>());
            if constexpr (requires { state.departures; }) part(state.departures.template of<G>());
        });
    }

  private:
    // A paged group's tail that was only just opened, for the next token; a recurrence's whose
    // state is still to be copied there.
    template <class G, class State>
    static bool blank_tail(const State& state) {
        std::int32_t written = state.request->known().value - 1;
        if constexpr (requires { state.fed; }) written = state.fed.value;
        if constexpr (kPaged<G>) return written % state.request->page_size().value == 0;
        return written == 0 || !state.pages.template of<G>().sealed.empty();
    }

    StepId oldest_;
    Fingerprint result_;
    std::array<Names, kGroupKinds> device_names_, host_names_;
    Names slot_names_, node_names_;
    std::vector<std::int32_t> slots_, nodes_;
};

}  // namespace

Fingerprint Scheduler::fingerprint() const {
    Scribe scribe(ledger_.oldest());

    // Who comes before whom, over all that live.
    std::vector<Order> orders;
    const auto note = [&](const auto& state) {
        if constexpr (requires { state.request; }) orders.push_back(state.request->order());
    };
    const auto each_state = [&](const auto& visit) {
        queued_.each(visit);
        parked_.each(visit);
        loading_.each(visit);
        receiving_.each(visit);
        prefilling_.each(visit);
        decoding_.each(visit);
        stepping_.each(visit);
        verifying_.each(visit);
    };
    each_state(note);
    for (const auto& arrival : arrivals_) {
        if (const auto* queued = std::get_if<Queued>(&arrival)) note(*queued);
    }
    std::ranges::sort(orders);
    const auto rank = [&](const Order& order) {
        scribe.word(std::ranges::lower_bound(orders, order) - orders.begin());
    };

    scribe.size(orders.size());
    for (const SlotId slot : order_) {
        rank(running(slot).order());
        if (const auto* request = prefilling_.at(slot)) scribe.state(1, *request);
        if (const auto* request = decoding_.at(slot)) scribe.state(2, *request);
        if (const auto* request = stepping_.at(slot)) scribe.state(3, *request);
        if (const auto* request = verifying_.at(slot)) scribe.state(14, *request);
    }
    const auto lined_up = [&](std::int64_t tag) {
        return [&scribe, &rank, tag](const auto& state) {
            rank(state.request->order());
            scribe.state(tag, state);
        };
    };
    queued_.each(lined_up(4));
    parked_.each(lined_up(5));
    // These have no order of their own: by id.
    std::vector<std::pair<std::int64_t, SlotId>> apart;
    const auto set_apart = [&](const auto& state) {
        if constexpr (requires { state.request; }) {
            apart.emplace_back(state.request->id().value, state.slot.id());
        } else {
            apart.emplace_back(state.id.value, state.slot.id());
        }
    };
    loading_.each(set_apart);
    receiving_.each(set_apart);
    sending_.each(set_apart);
    doomed_.each(set_apart);
    cancelled_.each(set_apart);
    std::ranges::sort(apart);
    for (const auto& [id, slot] : apart) {
        if (const auto* request = loading_.at(slot)) lined_up(6)(*request);
        if (const auto* request = receiving_.at(slot)) lined_up(7)(*request);
        if (const auto* request = sending_.at(slot)) scribe.state(8, *request);
        if (const auto* request = doomed_.at(slot)) scribe.state(9, *request);
        if (const auto* request = cancelled_.at(slot)) scribe.state(10, *request);
    }

    scribe.size(flights_.size());
    for (const Flight& flight : flights_) {
        scribe.size(flight.rows.size());
        for (const Row& row : flight.rows) {
            scribe.slot(row.slot);
            scribe.word(row.start.value);
            scribe.word(row.count.value);
            scribe.size(row.sample_count());
            scribe.word(row.propose);
        }
        each_group([&]<class G>() {
            scribe.size(flight.stores.of<G>().size());
            for (const auto& stored : flight.stores.of<G>()) {
                scribe.node(stored.node.id());
                scribe.page<G>(stored.target.id());
            }
        });
    }
    scribe.size(arrivals_.size());
    for (const auto& arrival : arrivals_) {
        if (const auto* queued = std::get_if<Queued>(&arrival)) {
            lined_up(11)(*queued);
        } else if (const auto* report = std::get_if<Report>(&arrival)) {
            scribe.word(12);
            if (const auto slot = transfers_.owner(report->transfer)) scribe.slot(*slot);
            scribe.word(report->complete ? 1 : 0);
        } else {
            scribe.word(13);
            const auto* aborted = std::get_if<Aborted>(&arrival);
            scribe.word(aborted->request.value);
            scribe.word(std::ranges::binary_search(orders, aborted->order) ? 1 : 0);
        }
    }
    if (blocked_ && std::ranges::binary_search(orders, blocked_->order)) {
        rank(blocked_->order);
        for (const PageCount wanted : blocked_->wanted.by_kind) scribe.word(wanted.value);
    } else {
        scribe.word(kNothing);
    }

    // Whose turn it is: what each was given beyond the least that others of its priority were.
    std::map<std::int32_t, std::int64_t> least;
    turns_.each_line([&](std::int32_t priority, TenantId, std::int32_t, std::int64_t served) {
        const auto found = least.try_emplace(priority, served).first;
        found->second = std::min(found->second, served);
    });
    turns_.each_line(
        [&](std::int32_t priority, TenantId tenant, std::int32_t live, std::int64_t served) {
            scribe.word(priority);
            scribe.word(static_cast<std::int64_t>(tenant.value));
            scribe.word(live);
            scribe.word(served - least.at(priority));
        });

    // What the next plan will say.
    each_group([&]<class G>() {
        const GroupPlan& news = news_[place_of<G>()];
        scribe.size(news.table.slots.size());
        for (std::size_t i = 0; i < news.table.slots.size(); ++i) {
            scribe.slot(SlotId(news.table.slots[i]));
            scribe.word(news.table.indices[i]);
            scribe.page<G>(PageId<G>(news.table.pages[i]));
        }
        scribe.size(news.loads.pages.size() + news.handovers.pages.size());
        scribe.size(store_.index.leaving<G>().size());
        for (const auto& leaving : store_.index.leaving<G>()) {
            scribe.node(leaving.node.id());
            scribe.page<G>(leaving.source);
            scribe.page<G>(leaving.target.id());
        }
    });
    scribe.size(transfer_news_.ids.size());
    scribe.size(bound_slots_.size());
    scribe.size(outcome_.requests.size());
    scribe.size(outcome_.finished.size());

    // The index by content, and in which order what nobody refers to would go.
    const ContentTree& tree = store_.index.tree();
    std::vector<NodeId> nodes;
    for (std::size_t i = 0; i < tree.capacity(); ++i) {
        const NodeId node(static_cast<std::int32_t>(i));
        if (tree.links(node) && tree.listed(node)) nodes.push_back(node);
    }
    std::ranges::sort(
        nodes, {}, [&](NodeId node) { return std::tuple(tree.hash(node).hi, tree.hash(node).lo); });
    scribe.size(nodes.size());
    for (const NodeId node : nodes) {
        scribe.word(static_cast<std::int64_t>(tree.hash(node).lo));
        scribe.node(node);
    }
    const auto tier = [&]<class G, class T>() {
        const TierCache<G, T>& cache = store_.index.tier<G, T>();
        if (!cache.present()) return;
        for (const NodeId node : nodes) {
            const auto page = tree.copy<G, T>(node).page;
            scribe.word(page ? 1 : 0);
            if (!page) continue;
            scribe.page<G>(*page);
            scribe.word(cache.references(*page).value_or(0));
        }
    };
    each_group([&]<class G>() {
        tier.template operator()<G, Device>();
        tier.template operator()<G, Host>();
    });
    std::map<std::int64_t, BranchId> branches;
    for (const auto& [id, place] : places_) {
        if (place.branch) branches.emplace(id, *place.branch);
    }
    std::vector<BranchId> wanted;
    for (const auto& [id, branch] : branches) {
        wanted.push_back(branch);
        // What it answered before it ended is told to its session when its pages are back.
        if (store_.index.sessions().learns()) scribe.word(places_.at(id).outputs.value);
    }
    store_.index.sessions().describe(nodes, wanted, scribe.words());
    return std::move(scribe).result();
}

}  // namespace tokenspeed::control
