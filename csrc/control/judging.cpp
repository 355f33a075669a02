// The scheduler's judgements: what fits under the floor, who may run, who gives way, who waits.

#include <algorithm>
#include <limits>

#include "forecast.h"
#include "scheduler.h"

namespace tokenspeed::control {

// --- the floor ----------------------------------------------------------------------------------

StepWork Scheduler::drafted_work() const noexcept {
    StepWork work;
    for (std::size_t i = 0; i < rows_.size(); ++i) {
        if (static_cast<std::int32_t>(i) < decode_count_) {
            work.add_decode(rows_[i].start);
            work.draft_tokens += static_cast<std::int64_t>(rows_[i].draft.size());
        } else {
            work.add_chunk(rows_[i].start, rows_[i].count);
        }
        work.add_proposal(rows_[i].propose);
        work.caught_up_tokens += rows_[i].reads;
    }
    return work;
}

TokenCount Scheduler::chunk_within_floor(TokenCount context, TokenCount most) const noexcept {
    if (!floor_.held() || decode_count_ == 0) return most;
    TokenCount longest;
    double least = std::numeric_limits<double>::infinity();
    for (std::int32_t i = 0; i < decode_count_; ++i) {
        longest = std::max(longest, rows_[static_cast<std::size_t>(i)].start);
        least = std::min(least, rows_[static_cast<std::size_t>(i)].expected);
    }
    return floor_.chunk(model_, drafted_work(), longest, least, context, most, page_size_);
}

// Whether all who run, but one, and a newcomer could decode together, each past its prompt.
bool Scheduler::floor_admits(const Request& newcomer, std::optional<SlotId> but) const noexcept {
    if (!floor_.held()) return true;
    StepWork work;
    TokenCount longest = newcomer.known();
    work.add_decode(newcomer.known());
    for (const SlotId slot : order_) {
        if (slot == but) continue;
        work.add_decode(running(slot).known());
        longest = std::max(longest, running(slot).known());
    }
    return floor_.admits(model_, work, longest);
}

std::optional<double> Scheduler::interval_bound_us(TokenCount context) const noexcept {
    if (!floor_.held()) return std::nullopt;
    return floor_.bound_us(model_, context);
}

// --- pages --------------------------------------------------------------------------------------

// Pages an admission leaves to those who run already: what all of them and the newcomer are going
// to need at their peak, and no less than `admission_reserve`. With nobody running nothing is left:
// whatever fits the pool is admitted in the end.
PageCount Scheduler::reserve_for(const Request& newcomer) {
    if (order_.empty()) return PageCount(0);
    growths_.clear();
    make_room_for(growths_, order_.size() + 1);
    const auto add = [&](const Request& request) {
        const auto whole = answers_.expected(request.outputs(), request.outputs_max());
        if (!whole) return;
        growths_.push_back({.remaining = std::max(*whole - request.outputs(), TokenCount(0)),
                            .owned = pages_for(request.known() - request.cached(), page_size_)});
    };
    for (const SlotId slot : order_) add(running(slot));
    add(newcomer);
    return std::max(peak_growth(growths_, page_size_), admission_reserve(order_.size(), newcomer));
}

// Of those behind `rank` and of the least priority among them, the one that costs least to bring
// back for each page it gives; the last in order of several. One that was just brought back is left
// alone until it made progress. `rank` if there is none.
std::size_t Scheduler::cheapest_victim(std::size_t rank) const noexcept {
    std::size_t victim = rank;
    double least = 0;
    for (std::size_t other = order_.size() - 1; other > rank; --other) {
        const Request& request = running(order_[other]);
        if (victim != rank && request.order().priority < running(order_[victim]).order().priority) {
            break;
        }
        if (!may_be_retracted(request)) continue;
        const double cost = cost_of_return(order_[other]);
        if (victim == rank || cost < least) {
            victim = other;
            least = cost;
        }
    }
    return victim;
}

// Time to compute again what is lost, and to begin at all, for each page that becomes free. Pages
// that others use neither go nor become free; those that the host takes are not lost.
double Scheduler::cost_of_return(SlotId slot) const noexcept {
    std::int64_t freed = 0;
    TokenCount kept(std::numeric_limits<std::int32_t>::max());
    const auto count = [&]<class G>(const auto& pages, std::size_t open) {
        const auto& device = store_.index.tier<G, Device>();
        // Of a full or latent group, whoever refers to a page refers to all before it: the pages
        // of its own come last.
        const auto own = std::ranges::partition_point(pages.sealed, [&](const PageRef<G>& page) {
            return device.references(page.id()).value_or(1) > 1;
        });
        freed += (pages.sealed.end() - own) + static_cast<std::int64_t>(open) +
                 static_cast<std::int64_t>(pages.promised.size());
        if constexpr (kWhole<G>) {
            const bool hosted = store_.index.tier<G, Host>().present();
            const auto count =
                hosted ? pages.sealed.size() : static_cast<std::size_t>(own - pages.sealed.begin());
            kept = std::min(kept, TokenCount(static_cast<std::int32_t>(count) * page_size_.value));
        }
    };
    const auto price = [&](const auto& request, TokenCount written) {
        each_group([&]<class G>() {
            if (!store_.index.has<G>()) return;
            const auto& pages = request.pages.template of<G>();
            if constexpr (requires { request.guesses; }) {
                count.template operator()<G>(pages, request.guesses.template of<G>().size());
            } else if constexpr (requires { pages.lent; }) {
                count.template operator()<G>(pages, pages.lent.size());
            } else {
                count.template operator()<G>(pages, pages.tail ? 1 : 0);
            }
        });
        // Without a group that keeps everything nothing is found again but what a window holds.
        if (kept > written) kept = TokenCount(0);
        StepWork again;
        again.add_chunk(kept, written - kept);
        const double cost =
            model_.trusted() ? model_.predict_us(again) : static_cast<double>(again.prefill_tokens);
        return cost / static_cast<double>(std::max<std::int64_t>(freed, 1));
    };
    if (const auto* request = decoding_.at(slot)) {
        return price(*request, request->request->known() - TokenCount(1));
    }
    if (const auto* request = prefilling_.at(slot)) return price(*request, request->fed);
    if (const auto* request = verifying_.at(slot)) {
        return price(*request, request->request->known() - TokenCount(1));
    }
    const Stepping& request = *stepping_.at(slot);
    return price(request, request.fed);
}

// --- waiting ------------------------------------------------------------------------------------

void Scheduler::wait(const Request& request) {
    turns_.wait(line_of(request.id()), request.order().arrival, uncached_of(request).value);
}

TokenCount Scheduler::uncached_of(const Request& request) const noexcept {
    const auto reusable =
        (request.tokens().size() - 1) / static_cast<std::size_t>(page_size_.value);
    const PageCount cached = store_.index.peek(std::span(request.hashes()).first(reusable));
    return request.known() - TokenCount(cached.value * page_size_.value);
}

std::optional<std::int64_t> Scheduler::expected_wait_us(const Request& newcomer) const noexcept {
    Outlook outlook{.backlog = turns_.ahead(line_of(newcomer.id()), uncached_of(newcomer).value),
                    .prompts = 0,
                    .decoding = {},
                    .longest = {},
                    .full = full_ || store_.slots.empty() || !floor_admits(newcomer, std::nullopt),
                    .answer = answers_.expected(TokenCount(0), context_max_),
                    .step_tokens_max = TokenCount(step_tokens_max_),
                    .page_size = page_size_};
    for (const SlotId slot : order_) {
        const TokenCount known = running(slot).known();
        outlook.prompts += std::max(prompt_left(slot).value, 0);
        outlook.decoding.add_decode(known);
        outlook.longest = std::max(outlook.longest, known);
    }
    return control::expected_wait_us(outlook, model_, floor_);
}

// It may come back by when its wait would be half of the limit, if nobody else came.
void Scheduler::refuse(Queued&& request, std::optional<std::int64_t> wait_us) {
    constexpr std::int64_t kRetryMin = 1'000, kRetryMax = 3'600'000;
    reserve_endings(1);
    const std::int64_t retry_ms = (wait_us.value_or(0) - *queue_timeout_us_ / 2) / 1'000;
    const Finished finished = finish(std::move(request), FinishReason::kRefused);
    report_end(finished.id, finished.reason,
               static_cast<std::int32_t>(std::clamp(retry_ms, kRetryMin, kRetryMax)));
    forget(finished.id);
    ++refusals_;
}

// Ends those who have waited for longer than they may. Whoever had a slot and lost it stays.
void Scheduler::refuse_late() {
    for (; !deadlines_.empty() && deadlines_.front().at_us < now_us_; deadlines_.pop_front()) {
        const Order order = deadlines_.front().order;
        const Queued* queued = queued_.at(order);
        if (queued == nullptr || queued->request->was_admitted()) continue;
        const auto wait_us = expected_wait_us(*queued->request);
        reserve_endings(1);
        turns_.leave(line_of(queued->request->id()), order.arrival);
        refuse(queued_.take(order), wait_us);
    }
}

}  // namespace tokenspeed::control
