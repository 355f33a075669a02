#include "storage.h"

#include <algorithm>
#include <limits>

#include "wrong.h"

namespace tokenspeed::proof {

namespace {

constexpr std::int64_t kNobody = std::numeric_limits<std::int64_t>::min();
constexpr std::int64_t kSeveral = kNobody + 1;
constexpr std::int64_t kStep = kNobody + 2;  // no request's: a copy that a step makes
constexpr std::int32_t kNothing = std::numeric_limits<std::int32_t>::min();

}  // namespace

std::uint64_t follow(std::uint64_t state, std::int32_t token) noexcept {
    std::uint64_t mixed = state ^ (static_cast<std::uint64_t>(token) + 0x9e3779b97f4a7c15);
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
    return mixed ^ (mixed >> 31);
}

Storage::Storage(const control::GroupConfig& group, const Sizes& sizes)
    : group_(group),
      sizes_(sizes),
      cells_each_(group.kind == control::GroupKind::kRecurrent ? 1 : sizes.page_size),
      table_(index(sizes.slots_max)),
      writers_(index(group.pages), kNobody) {
    for (auto [pool, pages] : {std::pair(&device_, group.pages), {&host_, group.host_pages}}) {
        pool->cells.resize(index(pages) * index(cells_each_), {0, kNothing, 0});
        pool->versions.resize(index(pages));
    }
}

// --- pages --------------------------------------------------------------------------------------

std::span<Storage::Cell> Storage::cells(Pool& pool, std::int32_t page) const {
    return std::span(pool.cells).subspan(index(page) * index(cells_each_), index(cells_each_));
}

std::span<const Storage::Cell> Storage::cells(const Pool& pool, std::int32_t page) const {
    return std::span(pool.cells).subspan(index(page) * index(cells_each_), index(cells_each_));
}

void Storage::blank(Pool& pool, std::int32_t page) {
    std::ranges::fill(cells(pool, page), Cell{0, kNothing, 0});
    touch(pool, page);
}

void Storage::copy(Pool& from, std::int32_t source, Pool& to, std::int32_t target) {
    expect_page(from, source);
    expect_page(to, target);
    std::ranges::copy(cells(from, source), cells(to, target).begin());
    touch(to, target);
}

void Storage::expect_page(const Pool& pool, std::int32_t page) const {
    expect(page >= 0 && index(page) < pool.versions.size(), "device: a page that does not exist");
}

void Storage::expect_writable(std::int32_t page, std::int64_t request) const {
    expect_page(device_, page);
    for (const auto& readers : flights_) {
        const std::int64_t reader = readers[index(page)];
        if (reader != kNobody && reader != request) {
            wrong("device: page " + text(page) + " is rewritten while another request reads it");
        }
    }
    expect(!moving_.contains(page), "device: a page is written that a transfer moves");
}

void Storage::note_reader(std::int32_t page, std::int64_t request) {
    std::int64_t& reader = flights_.back()[index(page)];
    reader = reader == kNobody || reader == request ? request : kSeveral;
}

// Two rows of a step never write the same page.
void Storage::claim(std::int32_t page, std::int64_t request) {
    expect_writable(page, request);
    std::int64_t& writer = writers_[index(page)];
    expect(writer == kNobody, "device: a step writes the same page twice");
    writer = request;
    touch(device_, page);
}

// The first position that a query at `start` sees.
std::int32_t Storage::first_seen(std::int32_t start) const {
    if (group_.kind != control::GroupKind::kWindow) return 0;
    return std::max(0, start - group_.window + 1);
}

// --- a step -------------------------------------------------------------------------------------

void Storage::begin(const control::GroupPlan& plan, const control::Transfers& transfers) {
    expect(plan.kind == group_.kind, "device: a plan's groups are out of order");
    flights_.emplace_back(device_.versions.size(), kNobody);
    std::ranges::fill(writers_, kNobody);

    const auto same = [](const auto& a, const auto& b) { return a.size() == b.size(); };
    expect(same(plan.stores.sources, plan.stores.targets) &&
               same(plan.copies.sources, plan.copies.targets) &&
               same(plan.saves.sources, plan.saves.targets) &&
               same(plan.loads.transfers, plan.loads.pages) &&
               same(plan.loads.elsewhere, plan.loads.pages) &&
               same(plan.handovers.transfers, plan.handovers.pages) &&
               same(plan.handovers.elsewhere, plan.handovers.pages) &&
               same(plan.table.slots, plan.table.pages) &&
               same(plan.table.indices, plan.table.pages),
           "device: the columns of a plan disagree");
    for (std::size_t i = 0; i < plan.stores.sources.size(); ++i) {
        copy(device_, plan.stores.sources[i], host_, plan.stores.targets[i]);
    }
    const auto begin_transfers = [&](const control::Cargo& cargo, bool loads) {
        for (std::size_t i = 0; i < cargo.pages.size(); ++i) {
            const auto which = index(cargo.transfers[i]);
            expect(which < transfers.ids.size(), "device: a transfer moves pages but is not there");
            const auto kind = static_cast<control::TransferKind>(transfers.kinds[which]);
            expect(loads == (kind == control::TransferKind::kLoad),
                   "device: a transfer of one kind moves pages of another");
            const std::int32_t page = cargo.pages[i];
            Cargo moved{cargo.elsewhere[i], page, 0, 0};
            if (kind != control::TransferKind::kSend) {
                expect_writable(page, kStep);
                blank(device_, page);
                moving_[page] = transfers.ids[which];
            }
            moved.version = device_.versions[index(page)];
            if (loads) {
                expect_page(host_, moved.elsewhere);
                moved.host_version = host_.versions[index(moved.elsewhere)];
            }
            transfers_[transfers.ids[which]].push_back(moved);
        }
    };
    begin_transfers(plan.loads, true);
    begin_transfers(plan.handovers, false);
    for (std::size_t i = 0; i < plan.table.slots.size(); ++i) {
        expect_page(device_, plan.table.pages[i]);
        expect(plan.table.slots[i] >= 0 && plan.table.slots[i] < sizes_.slots_max,
               "device: a slot that does not exist");
        const std::int32_t place = plan.table.indices[i];
        expect(place >= 0 && place <= (paged() ? sizes_.context_max / sizes_.page_size : 0),
               "device: a page past the end of the context");
        auto& entries = table_[index(plan.table.slots[i])];
        while (entries.size() <= index(place)) entries.push_back({kNothing, 0, 0});
        entries[index(place)] = {plan.table.pages[i], 0, 0};
    }
    for (std::size_t i = 0; i < plan.copies.sources.size(); ++i) {
        expect_writable(plan.copies.targets[i], kStep);
        copy(device_, plan.copies.sources[i], device_, plan.copies.targets[i]);
        note_reader(plan.copies.sources[i], kStep);
    }
}

Storage::Entry& Storage::entry(const Row& row, std::size_t place) {
    auto& entries = table_[index(row.slot)];
    expect(place < entries.size() && entries[place].page >= 0,
           "device: a row uses a page it was never given");
    return entries[place];
}

void Storage::write(std::span<const Row> rows, std::span<const std::int32_t> kv_slots) {
    std::size_t at = 0;
    for (const Row& row : rows) {
        if (!paged()) {
            write_state(row);
            continue;
        }
        expect(at + row.tokens.size() <= kv_slots.size(), "device: tokens without a place");
        write_positions(row, kv_slots.subspan(at, row.tokens.size()));
        at += row.tokens.size();
    }
    expect(at == kv_slots.size(), "device: places without a token");
}

void Storage::write_positions(const Row& row, std::span<const std::int32_t> kv_slots) {
    std::int32_t claimed = kNothing;
    for (std::size_t i = 0; i < row.tokens.size(); ++i) {
        const std::int32_t position = row.start + static_cast<std::int32_t>(i);
        const std::int32_t offset = position % sizes_.page_size;
        const std::int32_t page = entry(row, index(position / sizes_.page_size)).page;
        expect(kv_slots[i] == page * sizes_.page_size + offset,
               "device: a row writes to another place than its table says");
        if (page != claimed) {
            claim(page, row.request);
            claimed = page;
            // A page begins blank: what it held before can matter to nobody.
            if (offset == 0) blank(device_, page);
        }
        cells(device_, page)[index(offset)] = {static_cast<std::uint64_t>(row.tokens[i]), position,
                                               row.history.salt};
    }
}

void Storage::write_state(const Row& row) {
    const std::int32_t page = entry(row, 0).page;
    claim(page, row.request);
    Cell& cell = cells(device_, page).front();
    if (row.start > 0) {
        expect(cell.position == row.start && cell.salt == row.history.salt &&
                   (index(row.start) >= row.history.states.size() ||
                    cell.value == row.history.states[index(row.start)]),
               "device: a recurrence goes on from another state");
    }
    std::uint64_t state = row.start > 0 ? cell.value : 0;
    for (const std::int32_t token : row.tokens) state = follow(state, token);
    cell = {state, row.end(), row.history.salt};
    note_reader(page, row.request);
}

void Storage::read(std::span<const Row> rows) {
    if (!paged()) return;
    for (const Row& row : rows) {
        const std::int32_t end = row.end();
        std::int32_t from = first_seen(row.start) / sizes_.page_size * sizes_.page_size;
        for (; from < end; from += sizes_.page_size) {
            Entry& seen = entry(row, index(from / sizes_.page_size));
            note_reader(seen.page, row.request);
            const std::int64_t writer = writers_[index(seen.page)];
            expect(writer == kNobody || writer == row.request,
                   "device: a row reads what another row writes");
            expect(!moving_.contains(seen.page), "device: a row reads what a transfer writes");
            // A row sees its own wrong guesses, and nobody else ever does.
            const std::int32_t wanted =
                std::max(0, std::min(sizes_.page_size, row.sure_end() - from));
            if (seen.version != device_.versions[index(seen.page)] || seen.right < wanted) {
                check(row, seen, from, wanted);
            }
        }
    }
}

// That the page holds the request's own history. Positions that no query sees may hold anything.
void Storage::check(const Row& row, Entry& seen, std::int32_t from, std::int32_t wanted) const {
    const std::int32_t first = std::max(from, first_seen(row.start));
    for (std::int32_t position = first; position < from + wanted; ++position) {
        const Cell& cell = cells(device_, seen.page)[index(position - from)];
        // What a doomed row feeds past the end of its request is nobody's.
        const auto& tokens = row.history.tokens;
        const bool right = cell.position == position && cell.salt == row.history.salt &&
                           (index(position) >= tokens.size() ||
                            cell.value == static_cast<std::uint64_t>(tokens[index(position)]));
        if (!right) {
            wrong("device: request " + text(row.request) + " reads token " +
                  text(static_cast<std::int64_t>(cell.value)) + " of position " +
                  text(cell.position) + " and salt " + text(static_cast<std::int64_t>(cell.salt)) +
                  " at position " + text(position));
        }
    }
    if (first == from) seen.right = wanted;
    seen.version = device_.versions[index(seen.page)];
}

void Storage::end(const control::GroupPlan& plan) {
    for (std::size_t i = 0; i < plan.saves.sources.size(); ++i) {
        expect_writable(plan.saves.targets[i], kStep);
        expect_page(device_, plan.saves.targets[i]);
        expect(writers_[index(plan.saves.targets[i])] == kNobody,
               "device: a step writes the same page twice");
        copy(device_, plan.saves.sources[i], device_, plan.saves.targets[i]);
        note_reader(plan.saves.targets[i], kStep);
    }
}

// --- transfers ----------------------------------------------------------------------------------

void Storage::transferred(std::int64_t transfer, control::TransferKind kind, bool complete,
                          const History& history, std::int32_t known) {
    const auto found = transfers_.find(transfer);
    const std::vector<Cargo> cargo =
        found == transfers_.end() ? std::vector<Cargo>() : std::move(found->second);
    if (found != transfers_.end()) transfers_.erase(found);
    std::int32_t covered = known;
    for (const Cargo& moved : cargo) {
        expect(device_.versions[index(moved.page)] == moved.version,
               "device: a page was written while a transfer moved it");
        if (kind != control::TransferKind::kSend) moving_.erase(moved.page);
        if (!complete) continue;
        if (kind == control::TransferKind::kLoad) {
            expect(host_.versions[index(moved.elsewhere)] == moved.host_version,
                   "device: a page of the host was written while a transfer read it");
            copy(host_, moved.elsewhere, device_, moved.page);
            continue;
        }
        const auto page = cells(device_, moved.page);
        const auto there = [&](std::int32_t position, Cell& cell, std::uint64_t value) {
            const Cell wanted{value, position, history.salt};
            if (kind == control::TransferKind::kReceive) cell = wanted;
            expect(cell == wanted, "device: another engine reads what it should not");
        };
        if (!paged()) {
            there(known, page.front(), history.states[index(known)]);
        } else {
            const std::int32_t from = moved.elsewhere * sizes_.page_size;
            for (std::int32_t i = 0; i < sizes_.page_size && from + i < known; ++i) {
                const auto token = history.tokens[index(from + i)];
                there(from + i, page[index(i)], static_cast<std::uint64_t>(token));
            }
            covered = std::min(covered, from);
        }
        if (kind == control::TransferKind::kReceive) touch(device_, moved.page);
    }
    if (complete && kind == control::TransferKind::kSend) {
        expect(paged() ? covered <= first_seen(known) : !cargo.empty(),
               "device: another engine is not given all it needs");
    }
}

// --- fingerprints -------------------------------------------------------------------------------

void Storage::scribble(const control::Fingerprint& live) {
    const auto kind = static_cast<std::size_t>(group_.kind);
    for (auto [pool, listed] :
         {std::pair(&device_, &live.pages[kind]), {&host_, &live.host_pages[kind]}}) {
        std::vector<bool> kept(pool->versions.size());
        for (const std::int32_t page : *listed) kept[index(page)] = true;
        for (std::size_t page = 0; page < kept.size(); ++page) {
            if (!kept[page]) blank(*pool, static_cast<std::int32_t>(page));
        }
    }
}

void Storage::describe(control::Fingerprint& fingerprint) const {
    const auto kind = static_cast<std::size_t>(group_.kind);
    for (auto [pool, listed] :
         {std::pair(&device_, &fingerprint.pages[kind]), {&host_, &fingerprint.host_pages[kind]}}) {
        for (const std::int32_t page : *listed) {
            for (const Cell& cell : cells(*pool, page)) {
                fingerprint.words.push_back(static_cast<std::int64_t>(cell.value));
                fingerprint.words.push_back(cell.position);
                fingerprint.words.push_back(static_cast<std::int64_t>(cell.salt));
            }
        }
    }
    for (const auto& readers : flights_) {
        for (const std::int32_t page : fingerprint.pages[kind]) {
            fingerprint.words.push_back(readers[index(page)]);
        }
    }
}

void Storage::describe(const control::Fingerprint& names, std::int32_t slot, std::int32_t fed,
                       std::vector<std::int64_t>& words) const {
    const auto& listed = names.pages[static_cast<std::size_t>(group_.kind)];
    const auto& entries = table_[index(slot)];
    words.push_back(static_cast<std::int64_t>(entries.size()));
    const std::size_t first = paged() ? index(first_seen(fed) / sizes_.page_size) : 0;
    for (std::size_t i = first; i < entries.size(); ++i) {
        words.push_back(std::ranges::find(listed, entries[i].page) - listed.begin());
    }
}

}  // namespace tokenspeed::proof
