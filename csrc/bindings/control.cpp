// Python module _control: plain values in, plain values out; nothing is decided here.
//
// A plan crosses as two buffers, one per element type, whose parts `tokenspeed.control` names; one
// array object costs more than all the numbers in it.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>

#include "draft_lengths.h"
#include "scheduler.h"
#include "suffix_automaton.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace control = tokenspeed::control;

namespace {

template <class T>
using Column = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
template <class T>
using Given = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = Given<std::int32_t>;

// Joins vectors in one buffer that Python owns.
template <class T, class... Part>
Column<T> join(const Part&... parts) {
    const std::size_t size = (parts.size() + ... + 0);
    auto data = std::make_unique<T[]>(size);
    T* end = data.get();
    ((end = std::copy(parts.begin(), parts.end(), end)), ...);
    nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Column<T>(data.release(), {size}, owner);
}

// The same as bare bytes, which cost less to make than an array object.
template <class T, class... Part>
nb::object pack(const Part&... parts) {
    const std::size_t size = (parts.size() + ... + 0);
    PyObject* const bytes =
        PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size * sizeof(T)));
    if (bytes == nullptr) throw nb::python_error();
    char* end = PyByteArray_AS_STRING(bytes);
    const auto add = [&](const std::vector<T>& part) {
        if (part.empty()) return;
        std::memcpy(end, part.data(), part.size() * sizeof(T));
        end += part.size() * sizeof(T);
    };
    (add(parts), ...);
    return nb::steal(bytes);
}

// slot, guesses that were run
using Cuts = std::vector<std::pair<std::int32_t, std::int32_t>>;

std::vector<control::CutDraft> drafts_of(const Cuts& cuts) {
    std::vector<control::CutDraft> drafts;
    for (const auto& [slot, guesses] : cuts) drafts.push_back({slot, guesses});
    return drafts;
}

// kind, pages, host_pages, window, checkpoint_pages
using Group = std::tuple<std::int32_t, std::int32_t, std::int32_t, std::int32_t, std::int32_t>;

std::vector<control::GroupConfig> group_configs(const std::vector<Group>& groups) {
    std::vector<control::GroupConfig> configs;
    for (const auto& [kind, pages, host_pages, window, checkpoint_pages] : groups) {
        configs.push_back(
            {static_cast<control::GroupKind>(kind), pages, host_pages, window, checkpoint_pages});
    }
    return configs;
}

template <class T>
std::span<const T> span(const Given<T>& given) {
    return {given.data(), given.shape(0)};
}

std::vector<std::int32_t> copy(const Tokens& tokens) {
    return {tokens.data(), tokens.data() + tokens.shape(0)};
}

void translate(const std::exception_ptr& pointer, void* errors) {
    const auto raise = [&](const char* name, const char* message) {
        nb::handle module(static_cast<PyObject*>(errors));
        PyErr_SetString(module.attr(name).ptr(), message);
    };
    try {
        std::rethrow_exception(pointer);
    } catch (const control::ConfigError& error) {
        raise("ConfigError", error.what());
    } catch (const control::InvalidParameter& error) {
        raise("InvalidParameter", error.what());
    } catch (const control::ContextOverflow& error) {
        raise("ContextOverflow", error.what());
    } catch (const control::EngineError& error) {
        raise("EngineError", error.what());
    }
}

// One buffer for each group, which says how long its parts are.
nb::tuple group_plan(const control::GroupPlan& group) {
    const auto& table = group.table;
    return nb::make_tuple(
        static_cast<std::int32_t>(group.kind),
        nb::make_tuple(group.kv_slots.size(), table.slots.size(), group.stores.sources.size(),
                       group.copies.sources.size(), group.saves.sources.size(),
                       group.loads.pages.size(), group.handovers.pages.size()),
        pack<std::int32_t>(
            group.kv_slots, table.slots, table.indices, table.pages, group.stores.sources,
            group.stores.targets, group.copies.sources, group.copies.targets, group.saves.sources,
            group.saves.targets, group.loads.transfers, group.loads.elsewhere, group.loads.pages,
            group.handovers.transfers, group.handovers.elsewhere, group.handovers.pages));
}

nb::object plan(control::Scheduler& scheduler, std::int64_t now_us) {
    const auto plan = scheduler.plan(now_us);
    if (!plan) return nb::none();
    nb::list groups;
    for (const auto& group : plan->groups) groups.append(group_plan(group));
    const auto& transfers = plan->transfers;
    return nb::make_tuple(
        plan->step.value, plan->decode_count, plan->row_slots.size(), plan->token_ids.size(),
        plan->sample_rows.size(), plan->propose_counts.size(), plan->bound_slots.size(),
        transfers.ids.size(),
        pack<std::int32_t>(plan->row_slots, plan->query_starts, plan->context_lens, plan->token_ids,
                           plan->sample_rows, plan->sample_positions, plan->propose_counts,
                           plan->bound_slots, transfers.kinds),
        pack<std::int64_t>(plan->bound_requests, transfers.ids, transfers.requests), groups);
}

nb::object take_outcome(control::Scheduler& scheduler) {
    const auto outcome = scheduler.take_outcome();
    return nb::make_tuple(
        outcome.requests.size(), outcome.finished.size(), outcome.admitted.size(),
        pack<std::int32_t>(outcome.tokens, outcome.sample_indices, outcome.cached_counts,
                           outcome.reasons, outcome.retries_ms, outcome.draft_reports,
                           outcome.reports),
        pack<std::int64_t>(outcome.requests, outcome.finished, outcome.admitted));
}

nb::object take_cache_events(control::Scheduler& scheduler) {
    const auto events = scheduler.take_cache_events();
    if (events.kinds.empty()) return nb::none();
    return nb::make_tuple(events.kinds.size(), join<std::int32_t>(events.kinds, events.tokens),
                          join<std::int64_t>(events.hashes, events.parents),
                          join<bool>(events.has_parents));
}

nb::tuple stats(const control::Scheduler& scheduler) {
    const auto s = scheduler.stats();
    return nb::make_tuple(
        s.running, s.waiting, s.parked, s.transferring, s.waiting_uncached_tokens, s.pages_total,
        s.pages_free, s.pages_cached, s.pages_active, s.host_pages_total, s.host_pages_cached,
        s.steps, s.prompt_tokens, s.cached_tokens, s.missed_evicted_tokens, s.missed_unseen_tokens,
        s.missed_other_salt_tokens, s.missed_tail_tokens, s.output_tokens, s.drafted_tokens,
        s.accepted_tokens, s.proposed_tokens, s.draft_memory_size_bytes, s.retractions, s.parkings,
        s.evictions, s.stores, s.loads, s.refusals);
}

}  // namespace

NB_MODULE(_control, module) {
    module.doc() = "The C++ control plane; `tokenspeed.control` is its typed face.";
    // Kept alive for as long as errors may be translated, which is as long as the process.
    static nb::object& errors =
        *new nb::object(nb::module_::import_("tokenspeed.core.errors"));  // NOLINT
    nb::register_exception_translator(translate, errors.ptr());

    nb::class_<control::SuffixAutomaton>(module, "SuffixAutomaton")
        .def(nb::init<>())
        .def("append", &control::SuffixAutomaton::append, "token"_a)
        .def("longest",
             [](const control::SuffixAutomaton& self) {
                 return nb::make_tuple(self.longest().length, self.longest().end);
             })
        .def("after", [](const control::SuffixAutomaton& self,
                         std::size_t index) { return self.after(self.longest(), index); })
        .def("size_bytes", &control::SuffixAutomaton::size_bytes)
        .def("size_bytes_after", &control::SuffixAutomaton::size_bytes_after, "more"_a);
    module.def(
        "draft_lengths",
        [](const std::vector<std::vector<float>>& chances, std::size_t rows, double step_us,
           double token_us, std::optional<double> limit_us, std::size_t most) {
            return control::draft_lengths(chances, rows, {step_us, token_us, limit_us}, most);
        },
        nb::kw_only(), "chances"_a, "rows"_a, "step_us"_a, "token_us"_a, "limit_us"_a.none(),
        "most"_a);
    nb::class_<control::Scheduler>(module, "Scheduler")
        .def(
            "__init__",
            [](control::Scheduler* self, const std::vector<Group>& groups, std::int32_t page_size,
               std::int32_t slots_max, std::int32_t step_tokens_max, std::int32_t context_max,
               std::int32_t overlap_depth, bool prefix_cache, std::int32_t cache_policy,
               std::optional<double> tps_floor, std::optional<std::int64_t> queue_timeout_us,
               std::int32_t step_drafts_max, std::int32_t step_proposals_max,
               std::int32_t proposal_length_max, std::int32_t proposal_window,
               std::uint64_t draft_memory_size_bytes) {
                new (self) control::Scheduler(
                    {group_configs(groups), page_size, slots_max, step_tokens_max, context_max,
                     overlap_depth, prefix_cache, static_cast<control::CachePolicy>(cache_policy),
                     tps_floor, queue_timeout_us, step_drafts_max, step_proposals_max,
                     proposal_length_max, proposal_window, draft_memory_size_bytes});
            },
            nb::kw_only(), "groups"_a, "page_size"_a, "slots_max"_a, "step_tokens_max"_a,
            "context_max"_a, "overlap_depth"_a, "prefix_cache"_a, "cache_policy"_a,
            "tps_floor"_a.none(), "queue_timeout_us"_a.none(), "step_drafts_max"_a,
            "step_proposals_max"_a, "proposal_length_max"_a, "proposal_window"_a,
            "draft_memory_size_bytes"_a)
        .def(
            "submit",
            [](control::Scheduler& self, std::int64_t request, const Tokens& prompt,
               std::int64_t max_new_tokens, std::int64_t min_new_tokens,
               const Tokens& stop_token_ids, std::uint64_t salt, std::int32_t priority,
               std::int32_t handover, std::uint64_t tenant) {
                self.submit({control::RequestId(request), copy(prompt), copy(stop_token_ids),
                             max_new_tokens, min_new_tokens, salt, priority,
                             static_cast<control::Handover>(handover), control::TenantId(tenant)});
            },
            "request"_a, "prompt"_a.noconvert(), "max_new_tokens"_a, "min_new_tokens"_a,
            "stop_token_ids"_a.noconvert(), "salt"_a, "priority"_a, "handover"_a, "tenant"_a)
        .def(
            "abort",
            [](control::Scheduler& self, std::int64_t request) {
                self.abort(control::RequestId(request));
            },
            "request"_a)
        .def(
            "transferred",
            [](control::Scheduler& self, std::int64_t transfer, bool complete) {
                self.transferred(control::TransferId(transfer), complete);
            },
            "transfer"_a, "complete"_a)
        .def("plan", plan, "now_us"_a)
        .def(
            "commit",
            [](control::Scheduler& self, std::int64_t step, const Tokens& tokens,
               std::int64_t now_us, const Cuts& cuts) {
                self.commit(control::StepId(step), span(tokens), now_us, {}, drafts_of(cuts));
            },
            "step"_a, "tokens"_a.noconvert(), "now_us"_a, "cuts"_a = Cuts())
        .def(
            "commit",
            [](control::Scheduler& self, std::int64_t step, const Tokens& tokens,
               std::int64_t now_us, const Tokens& proposed_starts, const Tokens& proposed_tokens,
               const Given<float>& proposed_chances, std::int64_t caught_up_tokens,
               const Cuts& cuts) {
                self.commit(control::StepId(step), span(tokens), now_us,
                            {span(proposed_starts), span(proposed_tokens), span(proposed_chances),
                             caught_up_tokens},
                            drafts_of(cuts));
            },
            "step"_a, "tokens"_a.noconvert(), "now_us"_a, "proposed_starts"_a.noconvert(),
            "proposed_tokens"_a.noconvert(), "proposed_chances"_a.noconvert(),
            "caught_up_tokens"_a = 0, "cuts"_a = Cuts())
        .def("take_outcome", take_outcome)
        .def(
            "tokens",
            [](const control::Scheduler& self, std::int64_t request) {
                return join<std::int32_t>(self.tokens(control::RequestId(request)));
            },
            "request"_a)
        .def("stats", stats)
        .def(
            "observe",
            [](control::Scheduler& self, std::int64_t prefill_tokens, std::int64_t decode_rows,
               std::int64_t draft_tokens, std::int64_t proposed_tokens,
               std::int64_t proposal_rounds, std::int64_t caught_up_tokens,
               std::int64_t context_tokens, double prefill_pairs, std::int64_t took_us) {
                self.observe({prefill_tokens, decode_rows, draft_tokens, proposed_tokens,
                              proposal_rounds, caught_up_tokens, context_tokens, prefill_pairs},
                             took_us);
            },
            nb::kw_only(), "prefill_tokens"_a, "decode_rows"_a, "draft_tokens"_a,
            "proposed_tokens"_a, "proposal_rounds"_a, "caught_up_tokens"_a, "context_tokens"_a,
            "prefill_pairs"_a, "took_us"_a)
        .def(
            "predict_us",
            [](const control::Scheduler& self, std::int64_t prefill_tokens,
               std::int64_t decode_rows, std::int64_t draft_tokens, std::int64_t proposed_tokens,
               std::int64_t proposal_rounds, std::int64_t caught_up_tokens,
               std::int64_t context_tokens, double prefill_pairs) {
                return self.step_times().predict_us(
                    {prefill_tokens, decode_rows, draft_tokens, proposed_tokens, proposal_rounds,
                     caught_up_tokens, context_tokens, prefill_pairs});
            },
            nb::kw_only(), "prefill_tokens"_a, "decode_rows"_a, "draft_tokens"_a,
            "proposed_tokens"_a, "proposal_rounds"_a, "caught_up_tokens"_a, "context_tokens"_a,
            "prefill_pairs"_a)
        .def(
            "interval_bound_us",
            [](const control::Scheduler& self, std::int32_t context) {
                return self.interval_bound_us(control::TokenCount(context));
            },
            "context"_a)
        .def("flush_cache", &control::Scheduler::flush_cache)
        .def("record_cache_events", &control::Scheduler::record_cache_events, "on"_a)
        .def("take_cache_events", take_cache_events)
        .def("audit", &control::Scheduler::audit);
}
