// Python module _control: plain values in, plain values out; nothing is decided here.
//
// A plan crosses as two buffers, one per element type, whose parts `tokenspeed.control` names; one
// array object costs more than all the numbers in it.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "scheduler.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace control = tokenspeed::control;

namespace {

template <class T>
using Column = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
using Tokens = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

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

nb::object plan(control::Scheduler& scheduler) {
    const auto plan = scheduler.plan();
    if (!plan) return nb::none();
    return nb::make_tuple(
        plan->step.value, plan->decode_count, plan->row_slots.size(), plan->token_ids.size(),
        plan->sample_rows.size(), plan->bound_slots.size(), plan->table.slots.size(),
        join<std::int32_t>(plan->row_slots, plan->query_starts, plan->context_lens, plan->token_ids,
                           plan->kv_slots, plan->sample_rows, plan->sample_positions,
                           plan->bound_slots, plan->table.slots, plan->table.indices,
                           plan->table.pages),
        join<std::int64_t>(plan->bound_requests));
}

nb::object take_outcome(control::Scheduler& scheduler) {
    const auto outcome = scheduler.take_outcome();
    return nb::make_tuple(outcome.requests.size(), outcome.finished.size(),
                          join<std::int32_t>(outcome.tokens, outcome.sample_indices,
                                             outcome.cached_counts, outcome.reasons),
                          join<std::int64_t>(outcome.requests, outcome.finished));
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
    return nb::make_tuple(s.running, s.waiting, s.waiting_uncached_tokens, s.pages_total,
                          s.pages_free, s.pages_cached, s.pages_active, s.steps, s.prompt_tokens,
                          s.cached_tokens, s.output_tokens, s.retractions, s.evictions);
}

}  // namespace

NB_MODULE(_control, module) {
    module.doc() = "The C++ control plane; `tokenspeed.control` is its typed face.";
    // Kept alive for as long as errors may be translated, which is as long as the process.
    static nb::object& errors =
        *new nb::object(nb::module_::import_("tokenspeed.core.errors"));  // NOLINT
    nb::register_exception_translator(translate, errors.ptr());

    nb::class_<control::Scheduler>(module, "Scheduler")
        .def(
            "__init__",
            [](control::Scheduler* self, std::int32_t pages, std::int32_t page_size,
               std::int32_t slots_max, std::int32_t step_tokens_max, std::int32_t context_max,
               std::int32_t overlap_depth, bool prefix_cache) {
                new (self) control::Scheduler({pages, page_size, slots_max, step_tokens_max,
                                               context_max, overlap_depth, prefix_cache});
            },
            nb::kw_only(), "pages"_a, "page_size"_a, "slots_max"_a, "step_tokens_max"_a,
            "context_max"_a, "overlap_depth"_a, "prefix_cache"_a)
        .def(
            "submit",
            [](control::Scheduler& self, std::int64_t request, const Tokens& prompt,
               std::int64_t max_new_tokens, std::int64_t min_new_tokens,
               const Tokens& stop_token_ids, std::uint64_t salt, std::int32_t priority) {
                self.submit({control::RequestId(request), copy(prompt), copy(stop_token_ids),
                             max_new_tokens, min_new_tokens, salt, priority});
            },
            "request"_a, "prompt"_a.noconvert(), "max_new_tokens"_a, "min_new_tokens"_a,
            "stop_token_ids"_a.noconvert(), "salt"_a, "priority"_a)
        .def(
            "abort",
            [](control::Scheduler& self, std::int64_t request) {
                self.abort(control::RequestId(request));
            },
            "request"_a)
        .def("plan", plan)
        .def(
            "commit",
            [](control::Scheduler& self, std::int64_t step, const Tokens& tokens) {
                self.commit(control::StepId(step), {tokens.data(), tokens.shape(0)});
            },
            "step"_a, "tokens"_a.noconvert())
        .def("take_outcome", take_outcome)
        .def(
            "tokens",
            [](const control::Scheduler& self, std::int64_t request) {
                return join<std::int32_t>(self.tokens(control::RequestId(request)));
            },
            "request"_a)
        .def("stats", stats)
        .def("flush_cache", &control::Scheduler::flush_cache)
        .def("record_cache_events", &control::Scheduler::record_cache_events, "on"_a)
        .def("take_cache_events", take_cache_events)
        .def("audit", &control::Scheduler::audit);
}
