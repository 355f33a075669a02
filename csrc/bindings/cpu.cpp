// Python module _cpu: tensors are borrowed for the length of a call, nothing is computed here.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <utility>

#include "attention.h"
#include "errors.h"
#include "experts.h"
#include "gemm.h"
#include "graph.h"
#include "latent.h"
#include "memory.h"
#include "packed.h"
#include "probes.h"
#include "quantise.h"
#include "rowwise.h"
#include "runtime.h"
#include "sampler.h"
#include "sampling.h"
#include "tensor.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace cpu = tokenspeed::cpu;

namespace {

void translate(const std::exception_ptr& pointer, void* errors) {
    const auto raise = [&](const char* name, const char* message) {
        nb::handle module(static_cast<PyObject*>(errors));
        PyErr_SetString(module.attr(name).ptr(), message);
    };
    try {
        std::rethrow_exception(pointer);
    } catch (const cpu::ConfigError& error) {
        raise("ConfigError", error.what());
    } catch (const cpu::KernelError& error) {
        raise("KernelError", error.what());
    }
}

using HostInts = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Ints = nb::ndarray<std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A sampler, the position of each sample, and where log-probabilities go.
using Sampling = std::tuple<cpu::Sampler*, HostInts, Floats, Ints, Floats>;

std::span<const std::int32_t> host_span(const HostInts& array) {
    return {array.data(), array.shape(0)};
}

// Room for log-probabilities: of each row that has some, and of as many likeliest tokens each.
cpu::Reports reports(const Floats& chosen, const Ints& ids, const Floats& values) {
    const std::size_t rows = chosen.shape(0);
    const std::size_t width = rows == 0 ? 0 : ids.shape(0) / rows;
    if (ids.shape(0) != rows * width || values.shape(0) != ids.shape(0)) {
        throw cpu::KernelError("every row that has log-probabilities needs as many of them");
    }
    return {{chosen.data(), rows}, ids.data(), values.data(), static_cast<std::int64_t>(width)};
}

// Room for so many quantised rows, in a tensor of bytes.
cpu::QuantisedRows quantised(const cpu::Runtime& runtime,
                             const tokenspeed::bindings::TensorReader& tensors, nb::handle bytes,
                             const char* name, std::int64_t rows, std::int64_t columns) {
    const auto memory = tensors.memory(bytes, name);
    const auto wanted = cpu::quantised_size_bytes(runtime.kernels(), rows, columns);
    if (columns % cpu::step_inputs != 0) {
        throw cpu::KernelError("rows of " + std::to_string(columns) +
                               " elements cannot be quantised; they must be multiples of 32");
    }
    if (static_cast<std::int64_t>(memory.size()) < wanted) {
        throw cpu::KernelError(std::string(name) + " has " + std::to_string(memory.size()) +
                               " bytes, but " + std::to_string(rows) + " quantised rows of " +
                               std::to_string(columns) + " elements take " +
                               std::to_string(wanted));
    }
    return {memory.data(), 0};
}

// A matrix, or room for so many quantised rows.
cpu::Result result(const cpu::Runtime& runtime, const tokenspeed::bindings::TensorReader& tensors,
                   nb::handle y, std::int64_t rows, std::int64_t columns) {
    if (!tensors.is_memory(y, "y")) return {tensors.rows<void*>(y, "y"), {}};
    return {{nullptr, cpu::Element::f32, rows, columns, columns},
            quantised(runtime, tensors, y, "y", rows, columns)};
}

std::vector<std::string_view> supported_isas() {
    std::vector<std::string_view> names;
    for (const cpu::Isa& isa : cpu::isas()) {
        if (isa.supported()) names.push_back(isa.name);
    }
    return names;
}

}  // namespace

NB_MODULE(_cpu, module) {
    module.doc() = "The C++ CPU kernels; `tokenspeed.kernels.cpu` is their typed face.";
    // Kept alive for as long as errors may be translated, which is as long as the process.
    static nb::object& errors =
        *new nb::object(nb::module_::import_("tokenspeed.core.errors"));  // NOLINT
    nb::register_exception_translator(translate, errors.ptr());

    module.def("supported_isas", supported_isas);
    // Comes to refer to torch, and is kept for as long as the process for that.
    static const auto& tensors = *new tokenspeed::bindings::TensorReader();  // NOLINT

    nb::class_<cpu::Arena>(module, "WeightMemory")
        .def(nb::init<std::size_t>(), nb::kw_only(), "size_bytes"_a)
        .def_prop_ro("taken_size_bytes", &cpu::Arena::taken_size_bytes)
        .def("give_back", &cpu::Arena::give_back, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<cpu::Runtime>(module, "Runtime")
        .def(nb::init<int, std::optional<std::string_view>, std::shared_ptr<cpu::Arena>>(),
             nb::kw_only(), "threads"_a, "isa"_a.none(), "memory"_a.none() = nb::none())
        .def_prop_ro("isa", [](const cpu::Runtime& self) { return self.isa().name; })
        .def_prop_ro("threads", [](cpu::Runtime& self) { return self.pool().threads(); })
        .def("measure_read_bytes_per_s", &cpu::measure_read_bytes_per_s, nb::kw_only(),
             "size_bytes"_a, "repeats"_a, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "measure_peaks",
            [](cpu::Runtime& self, int repeats) {
                const auto peaks = cpu::measure_peaks(self, repeats);
                return std::make_tuple(peaks.int8, peaks.bf16, peaks.f32);
            },
            nb::kw_only(), "repeats"_a, nb::call_guard<nb::gil_scoped_release>());

    module.def(
        "prefer_huge_pages",
        [](nb::handle tensor) {
            const auto found = tensors.borrow(tensor, "tensor");
            std::size_t size = found.element.bits / 8;
            for (int dim = 0; dim < found.dims; ++dim) {
                size *= static_cast<std::size_t>(found.shape[dim]);
            }
            cpu::prefer_huge_pages({static_cast<std::byte*>(found.data), size});
        },
        "tensor"_a);

    module.def(
        "quantised_size_bytes",
        [](const cpu::Runtime& runtime, std::int64_t rows, std::int64_t columns) {
            return cpu::quantised_size_bytes(runtime.kernels(), rows, columns);
        },
        "runtime"_a, "rows"_a, "columns"_a);

    nb::class_<cpu::PackedMatrix>(module, "PackedMatrix")
        .def_static(
            "pack",
            [](cpu::Runtime& runtime, std::string_view ggml_type, nb::handle blocks,
               std::int64_t outputs, std::int64_t inputs) {
                const auto bytes = tensors.integers<std::uint8_t>(blocks, "blocks");
                const nb::gil_scoped_release release;
                return cpu::PackedMatrix::pack(runtime, ggml_type, std::as_bytes(bytes), outputs,
                                               inputs);
            },
            "runtime"_a, "ggml_type"_a, "blocks"_a, nb::kw_only(), "outputs"_a, "inputs"_a)
        .def_static(
            "pack_dense",
            [](cpu::Runtime& runtime, nb::handle weight) {
                const auto rows = tensors.rows<const void*>(weight, "weight");
                const nb::gil_scoped_release release;
                return cpu::PackedMatrix::pack_dense(runtime, rows);
            },
            "runtime"_a, "weight"_a)
        .def_prop_ro("format", [](const cpu::PackedMatrix& self) { return self.format().name; })
        .def_prop_ro("outputs", &cpu::PackedMatrix::outputs)
        .def_prop_ro("inputs", &cpu::PackedMatrix::inputs)
        .def_prop_ro("size_bytes", &cpu::PackedMatrix::size_bytes);
    module.def(
        "linear",
        [](cpu::Runtime& runtime, nb::handle x, const std::vector<const cpu::PackedMatrix*>& weight,
           nb::handle bias, nb::handle y) {
            const auto y_rows = tensors.rows<void*>(y, "y");
            cpu::Operand from{};
            if (!tensors.is_memory(x, "x")) {
                from.rows = tensors.rows<const void*>(x, "x");
            } else if (!weight.empty()) {
                const std::int64_t inputs = weight.front()->inputs();
                from = {{nullptr, cpu::Element::f32, y_rows.rows, inputs, inputs},
                        quantised(runtime, tensors, x, "x", y_rows.rows, inputs)};
            }
            const void* added = bias.is_none()
                                    ? nullptr
                                    : tensors.vector(bias, "bias", y_rows.columns, y_rows.type);
            const nb::gil_scoped_release release;
            cpu::linear(runtime, from, weight, added, y_rows);
        },
        "runtime"_a, "x"_a, "weight"_a, "bias"_a.none(), "y"_a);
    module.def(
        "lookup",
        [](cpu::Runtime& runtime, nb::handle ids, const cpu::PackedMatrix& table, float scale,
           nb::handle y, std::optional<std::int64_t> first) {
            const auto rows = tensors.integers<std::int64_t>(ids, "ids");
            const auto y_rows = tensors.rows<void*>(y, "y");
            const nb::gil_scoped_release release;
            cpu::lookup(runtime, rows, table, scale, first, y_rows);
        },
        "runtime"_a, "ids"_a, "table"_a, "scale"_a, "y"_a, "first"_a.none() = nb::none());
    module.def(
        "aside",
        [](cpu::Runtime& runtime, nb::handle x, nb::handle y, nb::callable call) {
            const std::int64_t rows = tensors.borrow(x, "x").shape[0];
            tensors.borrow(y, "y");
            // Whoever drops the last copy may not hold the interpreter.
            const std::shared_ptr<nb::callable> kept(new nb::callable(std::move(call)),
                                                     [](nb::callable* made) {
                                                         const nb::gil_scoped_acquire held;
                                                         delete made;
                                                     });
            runtime.perform(rows, [kept](std::int64_t count) {
                const nb::gil_scoped_acquire held;
                (*kept)(count);
            });
        },
        "runtime"_a, "x"_a, "y"_a, "call"_a);
    module.def(
        "add_rms_norm",
        [](cpu::Runtime& runtime, nb::handle x, nb::handle residual, nb::handle weight,
           float epsilon, nb::handle stream, nb::handle y) {
            cpu::AddRmsNorm call{};
            call.x = tensors.rows<const void*>(x, "x");
            if (!residual.is_none()) {
                call.residual = tensors.rows<const void*>(residual, "residual", cpu::Element::f32);
            }
            if (!stream.is_none()) {
                call.stream = tensors.rows<void*>(stream, "stream", cpu::Element::f32);
            }
            call.y = result(runtime, tensors, y, call.x.rows, call.x.columns);
            call.weight_type = tensors.type_of(weight, "weight");
            call.weight = tensors.vector(weight, "weight", call.x.columns, call.weight_type);
            call.epsilon = epsilon;
            const nb::gil_scoped_release release;
            cpu::add_rms_norm(runtime, call);
        },
        "runtime"_a, "x"_a, "residual"_a.none(), "weight"_a, "epsilon"_a, "stream"_a.none(), "y"_a);
    module.def(
        "gate",
        [](cpu::Runtime& runtime, std::string_view activation, nb::handle x, nb::handle y) {
            const auto gates = tensors.rows<const void*>(x, "x");
            const cpu::Gated call{
                activation == "silu" ? cpu::Activation::silu : cpu::Activation::gelu_tanh, gates,
                result(runtime, tensors, y, gates.rows, gates.columns / 2)};
            const nb::gil_scoped_release release;
            cpu::gate(runtime, call);
        },
        "runtime"_a, "activation"_a, "x"_a, "y"_a);
    module.def(
        "angles",
        [](cpu::Runtime& runtime, nb::handle positions, nb::handle frequencies, float length,
           nb::handle cosines, nb::handle sines) {
            const auto places = tensors.integers<std::int64_t>(positions, "positions");
            const auto steps = tensors.floats(frequencies, "frequencies");
            const auto cos = tensors.floats(cosines, "cosines", places.size() * steps.size());
            const auto sin = tensors.floats(sines, "sines", places.size() * steps.size());
            const nb::gil_scoped_release release;
            cpu::angles(runtime, places, steps, length, cos.data(), sin.data());
        },
        "runtime"_a, "positions"_a, "frequencies"_a, "length"_a, "cosines"_a, "sines"_a);
    module.def(
        "rotate",
        [](cpu::Runtime& runtime, nb::handle x, nb::handle cosines, nb::handle sines,
           nb::handle y) {
            const auto shape = tensors.borrow(x, "x");
            cpu::Rotation call{};
            call.x = tensors.heads<const void*>(x, "x");
            call.y = tensors.heads<void*>(y, "y");
            call.heads = shape.shape[1];
            call.head_dim = shape.shape[2];
            const auto angles = tensors.borrow(cosines, "cosines");
            if (angles.dims != 2 || 2 * angles.shape[1] != call.head_dim) {
                throw cpu::KernelError("heads of " + std::to_string(call.head_dim) +
                                       " elements need half as many angles for each token");
            }
            const auto size = static_cast<std::size_t>(call.x.rows * angles.shape[1]);
            call.cosines = tensors.floats(cosines, "cosines", size).data();
            call.sines = tensors.floats(sines, "sines", size).data();
            const nb::gil_scoped_release release;
            cpu::rotate(runtime, call);
        },
        "runtime"_a, "x"_a, "cosines"_a, "sines"_a, "y"_a);
    module.def(
        "add",
        [](cpu::Runtime& runtime, nb::handle a, nb::handle b, nb::handle y) {
            const auto one = tensors.rows<const void*>(a, "a");
            const auto other = tensors.rows<const void*>(b, "b");
            const auto sum = tensors.rows<void*>(y, "y");
            const nb::gil_scoped_release release;
            cpu::add(runtime, one, other, sum);
        },
        "runtime"_a, "a"_a, "b"_a, "y"_a);
    module.def(
        "join",
        [](cpu::Runtime& runtime, nb::handle a, nb::handle b, nb::handle y) {
            const std::int64_t heads = tensors.borrow(y, "y").shape[1];
            const auto front = tensors.heads<const void*>(a, "a");
            const auto behind = tensors.heads<const void*>(b, "b");
            const auto joined = tensors.heads<void*>(y, "y");
            const nb::gil_scoped_release release;
            cpu::join(runtime, front, behind, heads, joined);
        },
        "runtime"_a, "a"_a, "b"_a, "y"_a);
    module.def(
        "route",
        [](cpu::Runtime& runtime, nb::handle logits, nb::handle bias, std::string_view scoring,
           bool normalise, float scale, std::int64_t groups, std::int64_t groups_kept,
           nb::handle chosen, nb::handle weights) {
            cpu::Routing call{};
            call.logits = tensors.rows<const void*>(logits, "logits");
            if (!bias.is_none()) {
                const auto size = static_cast<std::size_t>(call.logits.columns);
                call.bias = tensors.floats(bias, "bias", size).data();
            }
            call.scoring = scoring == "softmax"   ? cpu::Scoring::softmax
                           : scoring == "sigmoid" ? cpu::Scoring::sigmoid
                                                  : cpu::Scoring::chosen;
            call.normalise = normalise;
            call.scale = scale;
            call.groups = groups;
            call.groups_kept = groups_kept;
            const auto experts = tensors.integers<std::int64_t>(chosen, "chosen");
            call.count = tensors.borrow(chosen, "chosen").shape[1];
            if (static_cast<std::int64_t>(experts.size()) != call.logits.rows * call.count) {
                throw cpu::KernelError("every row of logits needs as many chosen experts");
            }
            call.chosen = const_cast<std::int64_t*>(experts.data());
            call.weights = tensors.floats(weights, "weights", experts.size()).data();
            const nb::gil_scoped_release release;
            cpu::route(runtime, call);
        },
        "runtime"_a, "logits"_a, "bias"_a.none(), "scoring"_a, "normalise"_a, "scale"_a, "groups"_a,
        "groups_kept"_a, "chosen"_a, "weights"_a);
    module.def(
        "experts",
        [](cpu::Runtime& runtime, nb::handle x, cpu::ExpertMatrices gate_up,
           cpu::ExpertMatrices down, nb::handle gate_up_bias, nb::handle down_bias,
           nb::handle chosen, nb::handle weights, std::int64_t first, std::optional<float> limit,
           nb::handle y) {
            cpu::Experts call{};
            call.x = tensors.rows<const void*>(x, "x");
            call.y = tensors.rows<void*>(y, "y");
            const auto bias = [&](nb::handle tensor, const char* name, std::int64_t columns) {
                if (tensor.is_none()) return static_cast<const void*>(nullptr);
                const auto rows = tensors.rows<const void*>(tensor, name, call.x.type);
                if (rows.rows != static_cast<std::int64_t>(gate_up.size()) ||
                    rows.columns != columns || (rows.stride != columns && rows.rows > 1)) {
                    throw cpu::KernelError(std::string(name) +
                                           " must be contiguous, a row for each expert");
                }
                return rows.data;
            };
            std::int64_t both = 0;
            if (!gate_up.empty()) {
                for (const cpu::PackedMatrix* part : gate_up.front()) both += part->outputs();
            }
            call.gate_up_bias = bias(gate_up_bias, "gate_up_bias", both);
            call.down_bias = bias(down_bias, "down_bias", call.x.columns);
            call.gate_up = std::move(gate_up);
            call.down = std::move(down);
            call.chosen = tensors.integers<std::int64_t>(chosen, "chosen");
            call.weights = tensors.floats(weights, "weights", call.chosen.size());
            call.first = first;
            call.limit = limit;
            const nb::gil_scoped_release release;
            cpu::experts(runtime, call);
        },
        "runtime"_a, "x"_a, "gate_up"_a, "down"_a, "gate_up_bias"_a.none(), "down_bias"_a.none(),
        "chosen"_a, "weights"_a, "first"_a, "limit"_a.none(), "y"_a);
    module.def(
        "take",
        [](cpu::Runtime& runtime, nb::handle x, nb::handle indices, nb::handle y) {
            const auto x_rows = tensors.rows<const void*>(x, "x");
            const auto taken = tensors.integers<std::int64_t>(indices, "indices");
            const auto y_rows = tensors.rows<void*>(y, "y");
            const nb::gil_scoped_release release;
            cpu::take(runtime, x_rows, taken, y_rows);
        },
        "runtime"_a, "x"_a, "indices"_a, "y"_a);
    module.def(
        "append",
        [](cpu::Runtime& runtime, nb::handle k, nb::handle v, nb::handle k_pool, nb::handle v_pool,
           nb::handle slots, nb::handle k_offset) {
            cpu::KvAppend call{};
            call.k = tensors.heads<const void*>(k, "k");
            call.v = tensors.heads<const void*>(v, "v");
            call.to = tensors.pages(k_pool, v_pool);
            if (!k_offset.is_none()) {
                const auto offset = tensors.rows<const void*>(k_offset, "k_offset");
                if (offset.rows != call.to.heads || offset.columns != call.to.head_dim ||
                    (offset.stride != offset.columns && offset.rows > 1)) {
                    throw cpu::KernelError("k_offset must be contiguous [" +
                                           std::to_string(call.to.heads) + ", " +
                                           std::to_string(call.to.head_dim) + "]");
                }
                call.k_offset = offset.data;
                call.offset_type = offset.type;
            }
            const auto places = tensors.integers<std::int64_t>(slots, "slots");
            if (static_cast<std::int64_t>(places.size()) != call.k.rows) {
                throw cpu::KernelError("every token needs one slot");
            }
            call.slots = places.data();
            const nb::gil_scoped_release release;
            cpu::append(runtime, call);
        },
        "runtime"_a, "k"_a, "v"_a, "k_pool"_a, "v_pool"_a, "slots"_a, "k_offset"_a.none());
    module.def(
        "attend",
        [](cpu::Runtime& runtime, nb::handle q, nb::handle k_pool, nb::handle v_pool,
           HostInts query_starts, HostInts context_lens, HostInts row_slots, nb::handle page_table,
           float scale, std::int64_t window, float soft_cap, nb::handle sinks, nb::handle y,
           std::optional<HostInts> seen, nb::handle log_sums) {
            cpu::Attention call{};
            call.heads = tensors.borrow(q, "q").shape[1];
            call.q = tensors.heads<const void*>(q, "q");
            call.y = tensors.heads<void*>(y, "y");
            call.kv = tensors.pages(k_pool, v_pool);
            const auto table = tensors.borrow(page_table, "page_table");
            const auto pages = tensors.integers<std::int32_t>(page_table, "page_table");
            const auto rows = static_cast<std::int64_t>(context_lens.shape(0));
            if (table.dims != 2 || static_cast<std::int64_t>(query_starts.shape(0)) != rows + 1 ||
                static_cast<std::int64_t>(row_slots.shape(0)) != rows) {
                throw cpu::KernelError("a step of " + std::to_string(rows) +
                                       " rows needs as many slots, and one start more");
            }
            call.rows = {query_starts.data(), context_lens.data(), row_slots.data(), pages.data(),
                         table.shape[1]};
            call.scale = scale;
            call.window = window;
            call.soft_cap = soft_cap;
            if (!sinks.is_none()) {
                call.sinks =
                    tensors.floats(sinks, "sinks", static_cast<std::size_t>(call.heads)).data();
            }
            if (seen) {
                if (static_cast<std::int64_t>(seen->shape(0)) != 2 * call.q.rows) {
                    throw cpu::KernelError("every token needs the two ends of what it sees");
                }
                call.seen = seen->data();
            }
            if (!log_sums.is_none()) {
                call.log_sums = tensors
                                    .floats(log_sums, "log_sums",
                                            static_cast<std::size_t>(call.q.rows * call.heads))
                                    .data();
            }
            const nb::gil_scoped_release release;
            cpu::attend(runtime, call, rows);
        },
        "runtime"_a, "q"_a, "k_pool"_a, "v_pool"_a, "query_starts"_a, "context_lens"_a,
        "row_slots"_a, "page_table"_a, "scale"_a, "window"_a, "soft_cap"_a, "sinks"_a.none(), "y"_a,
        "seen"_a.none() = nb::none(), "log_sums"_a.none() = nb::none());
    module.def(
        "append_latents",
        [](cpu::Runtime& runtime, nb::handle latents, nb::handle pool, nb::handle slots) {
            cpu::LatentAppend call{tensors.rows<const void*>(latents, "latents"),
                                   tensors.latents(pool), nullptr};
            const auto places = tensors.integers<std::int64_t>(slots, "slots");
            if (static_cast<std::int64_t>(places.size()) != call.latents.rows) {
                throw cpu::KernelError("every token needs one slot");
            }
            call.slots = places.data();
            const nb::gil_scoped_release release;
            cpu::append_latents(runtime, call);
        },
        "runtime"_a, "latents"_a, "pool"_a, "slots"_a);
    module.def(
        "attend_latents",
        [](cpu::Runtime& runtime, nb::handle q, nb::handle pool, HostInts query_starts,
           HostInts context_lens, HostInts row_slots, nb::handle page_table, float scale,
           nb::handle y, std::optional<HostInts> seen, nb::handle log_sums) {
            cpu::LatentAttention call{};
            call.heads = tensors.borrow(q, "q").shape[1];
            call.q = tensors.heads<const void*>(q, "q");
            call.y = tensors.heads<void*>(y, "y");
            call.value_dim = tensors.borrow(y, "y").shape[2];
            call.latents = tensors.latents(pool);
            const auto table = tensors.borrow(page_table, "page_table");
            const auto pages = tensors.integers<std::int32_t>(page_table, "page_table");
            const auto rows = static_cast<std::int64_t>(context_lens.shape(0));
            if (table.dims != 2 || static_cast<std::int64_t>(query_starts.shape(0)) != rows + 1 ||
                static_cast<std::int64_t>(row_slots.shape(0)) != rows) {
                throw cpu::KernelError("a step of " + std::to_string(rows) +
                                       " rows needs as many slots, and one start more");
            }
            call.rows = {query_starts.data(), context_lens.data(), row_slots.data(), pages.data(),
                         table.shape[1]};
            call.scale = scale;
            if (seen.has_value() == log_sums.is_none()) {
                throw cpu::KernelError("what tokens see and logarithms of sums go together");
            }
            if (!seen) {
                const nb::gil_scoped_release release;
                cpu::attend_latents(runtime, call, rows);
                return;
            }
            if (static_cast<std::int64_t>(seen->shape(0)) != call.q.rows) {
                throw cpu::KernelError("every token needs the end of what it sees");
            }
            float* const sums = tensors
                                    .floats(log_sums, "log_sums",
                                            static_cast<std::size_t>(call.q.rows * call.heads))
                                    .data();
            const nb::gil_scoped_release release;
            cpu::attend_latent_parts(runtime, call, rows, seen->data(), sums);
        },
        "runtime"_a, "q"_a, "pool"_a, "query_starts"_a, "context_lens"_a, "row_slots"_a,
        "page_table"_a, "scale"_a, "y"_a, "seen"_a.none() = nb::none(),
        "log_sums"_a.none() = nb::none());
    module.def(
        "argmax",
        [](cpu::Runtime& runtime, nb::handle logits, nb::handle tokens) {
            const auto rows = tensors.rows<const void*>(logits, "logits", cpu::Element::f32);
            const auto found = tensors.integers<std::int64_t>(tokens, "tokens");
            if (static_cast<std::int64_t>(found.size()) != rows.rows) {
                throw cpu::KernelError("every row of logits needs one token");
            }
            const nb::gil_scoped_release release;
            cpu::argmax(runtime, rows, const_cast<std::int64_t*>(found.data()));
        },
        "runtime"_a, "logits"_a, "tokens"_a);

    module.def(
        "draw",
        [](cpu::Runtime& runtime, nb::handle logits, nb::handle uniforms, nb::handle temperatures,
           nb::handle top_ks, nb::handle top_ps, nb::handle min_ps, nb::handle tokens) {
            cpu::Draw call{};
            call.logits = tensors.rows<const void*>(logits, "logits", cpu::Element::f32);
            const auto rows = static_cast<std::size_t>(call.logits.rows);
            const auto integers = [&](nb::handle tensor, const char* name) {
                const auto found = tensors.integers<std::int64_t>(tensor, name);
                if (found.size() != rows) {
                    throw cpu::KernelError(std::string(name) + " must have one entry for each row");
                }
                return found.data();
            };
            call.uniforms = tensors.doubles(uniforms, "uniforms", rows);
            call.temperatures = tensors.doubles(temperatures, "temperatures", rows);
            call.top_ks = integers(top_ks, "top_ks");
            call.top_ps = tensors.doubles(top_ps, "top_ps", rows);
            call.min_ps = tensors.doubles(min_ps, "min_ps", rows);
            call.tokens = const_cast<std::int64_t*>(integers(tokens, "tokens"));
            const nb::gil_scoped_release release;
            cpu::draw(runtime, call);
        },
        "runtime"_a, "logits"_a, "uniforms"_a, "temperatures"_a, "top_ks"_a, "top_ps"_a, "min_ps"_a,
        "tokens"_a);

    module.def(
        "logprobs",
        [](cpu::Runtime& runtime, nb::handle logits, nb::handle tokens, std::int64_t count,
           nb::handle chosen, nb::handle ids, nb::handle values) {
            cpu::Logprobs call{};
            call.logits = tensors.rows<const void*>(logits, "logits", cpu::Element::f32);
            call.count = count;
            const auto rows = static_cast<std::size_t>(call.logits.rows);
            const auto entries = rows * static_cast<std::size_t>(count);
            const auto wanted = tensors.integers<std::int64_t>(tokens, "tokens");
            const auto found = tensors.integers<std::int64_t>(ids, "ids");
            if (wanted.size() != rows || found.size() != entries) {
                throw cpu::KernelError("every row needs one token, and room for the likeliest");
            }
            call.tokens = wanted.data();
            call.chosen = tensors.floats(chosen, "chosen", rows).data();
            call.ids = const_cast<std::int64_t*>(found.data());
            call.values = tensors.floats(values, "values", entries).data();
            const nb::gil_scoped_release release;
            cpu::logprobs(runtime, call);
        },
        "runtime"_a, "logits"_a, "tokens"_a, "count"_a, "chosen"_a, "ids"_a, "values"_a);
    module.def(
        "apply_bitmask",
        [](cpu::Runtime& runtime, nb::handle logits, nb::handle bitmask) {
            const auto rows = tensors.rows<void*>(logits, "logits", cpu::Element::f32);
            const auto words = tensors.integers<std::int32_t>(bitmask, "bitmask");
            const auto shape = tensors.borrow(bitmask, "bitmask");
            if (shape.dims != 2 || shape.shape[0] != rows.rows) {
                throw cpu::KernelError("every row of logits needs a row of bits");
            }
            const nb::gil_scoped_release release;
            cpu::apply_bitmask(runtime, {rows, words.data(), shape.shape[1]});
        },
        "runtime"_a, "logits"_a, "bitmask"_a);
    module.def(
        "penalise",
        [](nb::handle logits, nb::handle seen, nb::handle output_counts, float repetition,
           float presence, float frequency) {
            const auto row = tensors.floats(logits, "logits");
            const auto ids = tensors.integers<std::int64_t>(seen, "seen");
            const auto counts = tensors.integers<std::int32_t>(output_counts, "output_counts");
            cpu::penalise(row, ids, counts, {repetition, presence, frequency});
        },
        "logits"_a, "seen"_a, "output_counts"_a, "repetition"_a, "presence"_a, "frequency"_a);
    module.def(
        "add_bias",
        [](nb::handle logits, nb::handle ids, nb::handle values) {
            const auto row = tensors.floats(logits, "logits");
            cpu::add_bias(row, {tensors.integers<std::int64_t>(ids, "ids"),
                                tensors.floats(values, "values")});
        },
        "logits"_a, "ids"_a, "values"_a);

    nb::class_<cpu::Sampler>(module, "Sampler")
        .def(nb::init<cpu::Runtime&, std::int64_t, std::int64_t>(), "runtime"_a, nb::kw_only(),
             "slots_max"_a, "vocabulary"_a, nb::keep_alive<1, 2>())
        .def(
            "bind",
            [](cpu::Sampler& self, std::int64_t slot, double temperature, std::int64_t top_k,
               double top_p, double min_p, std::uint64_t seed, std::int64_t min_new_tokens,
               std::optional<std::int64_t> logprobs, std::vector<std::int64_t> ends,
               std::vector<std::int64_t> bias_ids, std::vector<float> bias_values, float repetition,
               float presence, float frequency,
               std::optional<std::tuple<HostInts, HostInts>> seen) {
                cpu::SlotSettings settings{temperature,
                                           top_k,
                                           top_p,
                                           min_p,
                                           seed,
                                           min_new_tokens,
                                           {repetition, presence, frequency},
                                           logprobs,
                                           std::move(ends),
                                           std::move(bias_ids),
                                           std::move(bias_values)};
                std::optional<cpu::SlotTokens> tokens;
                if (seen) {
                    const auto& [prompt, output] = *seen;
                    tokens = {host_span(prompt), host_span(output)};
                }
                self.bind(slot, std::move(settings), tokens);
            },
            "slot"_a, nb::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a,
            "min_new_tokens"_a, "logprobs"_a.none(), "ends"_a, "bias_ids"_a, "bias_values"_a,
            "repetition"_a, "presence"_a, "frequency"_a, "seen"_a.none())
        .def("expect", &cpu::Sampler::expect, "slot"_a)
        .def(
            "allow",
            [](cpu::Sampler& self, std::int64_t slot, nb::handle bitmasks, std::size_t count) {
                if (bitmasks.is_none()) return self.allow(slot, {}, 0);
                const auto words = tensors.integers<std::int32_t>(bitmasks, "bitmasks");
                const std::size_t stride = count == 0 ? 0 : words.size() / count;
                if (std::cmp_less(stride * 32, self.vocabulary())) {
                    throw cpu::KernelError("a bitmask has a bit for each of " +
                                           std::to_string(self.vocabulary()) + " tokens");
                }
                self.allow(slot, words, stride);
            },
            "slot"_a, "bitmasks"_a.none(), "count"_a = 1)
        .def(
            "sample",
            [](cpu::Sampler& self, nb::handle logits, HostInts slots, HostInts positions,
               nb::handle tokens, Floats chosen, Ints ids, Floats values) {
                const auto rows = tensors.rows<void*>(logits, "logits", cpu::Element::f32);
                const auto found = tensors.integers<std::int64_t>(tokens, "tokens");
                const auto count = static_cast<std::size_t>(rows.rows);
                if (found.size() != count || slots.shape(0) != count ||
                    positions.shape(0) != count) {
                    throw cpu::KernelError(
                        "every row of logits needs one slot, position and token");
                }
                const cpu::Reports to = reports(chosen, ids, values);
                const nb::gil_scoped_release release;
                self.sample({rows, host_span(slots), host_span(positions),
                             const_cast<std::int64_t*>(found.data())},
                            to);
            },
            "logits"_a, "slots"_a, "positions"_a, "tokens"_a, "chosen"_a, "ids"_a, "values"_a);

    nb::class_<cpu::StepRecording>(module, "StepRecording")
        .def(
            "__init__",
            [](cpu::StepRecording* self, cpu::Runtime& runtime, nb::handle token_ids,
               nb::handle positions, Ints query_starts, Ints context_lens, Ints row_slots,
               nb::handle sampled, nb::handle last_tokens,
               const std::vector<std::tuple<nb::object, nb::object>>& groups) {
                const auto longs = [](nb::handle tensor, const char* name) {
                    const auto found = tensors.integers<std::int64_t>(tensor, name);
                    return std::span(const_cast<std::int64_t*>(found.data()), found.size());
                };
                cpu::StepInputs inputs{longs(token_ids, "token_ids"),
                                       longs(positions, "positions").data(),
                                       query_starts.data(),
                                       {context_lens.data(), context_lens.shape(0)},
                                       row_slots.data(),
                                       longs(sampled, "sampled"),
                                       longs(last_tokens, "last_tokens").data(),
                                       {}};
                for (const auto& [kv_slots, page_table] : groups) {
                    const auto pages = tensors.integers<std::int32_t>(page_table, "page_table");
                    inputs.groups.push_back({longs(kv_slots, "kv_slots").data(),
                                             const_cast<std::int32_t*>(pages.data()),
                                             tensors.borrow(page_table, "page_table").shape[1]});
                }
                new (self) cpu::StepRecording(runtime, std::move(inputs));
            },
            "runtime"_a, "token_ids"_a, "positions"_a, "query_starts"_a, "context_lens"_a,
            "row_slots"_a, "sampled"_a, "last_tokens"_a, "groups"_a, nb::keep_alive<1, 2>())
        .def(
            "begin",
            [](cpu::StepRecording& self, nb::handle watcher) {
                self.begin();
                tokenspeed::bindings::TensorReader::watch(watcher);
            },
            "watcher"_a.none() = nb::none())
        .def("end",
             [](cpu::StepRecording& self, nb::handle logits, nb::handle chosen) {
                 tokenspeed::bindings::TensorReader::watch(nb::none());
                 const auto tokens = tensors.integers<std::int64_t>(chosen, "chosen");
                 return self.end(tensors.rows<void*>(logits, "logits"),
                                 const_cast<std::int64_t*>(tokens.data()));
             })
        .def(
            "run",
            [](const cpu::StepRecording& self, std::int64_t decode_count, HostInts row_slots,
               HostInts query_starts, HostInts context_lens, HostInts token_ids,
               HostInts sample_rows,
               const std::vector<std::tuple<HostInts, HostInts, HostInts, HostInts>>& groups,
               Ints tokens, std::optional<Sampling> sampling) {
                cpu::RecordedPlan plan{decode_count,
                                       host_span(row_slots),
                                       host_span(query_starts),
                                       host_span(context_lens),
                                       host_span(token_ids),
                                       host_span(sample_rows),
                                       {}};
                for (const auto& [kv_slots, slots, indices, pages] : groups) {
                    plan.groups.push_back({host_span(kv_slots), host_span(slots),
                                           host_span(indices), host_span(pages)});
                }
                std::optional<cpu::RecordedSampling> choosing;
                if (sampling) {
                    const auto& [sampler, positions, chosen, ids, values] = *sampling;
                    if (positions.shape(0) != sample_rows.shape(0)) {
                        throw cpu::KernelError("every sample needs one position");
                    }
                    choosing.emplace(*sampler, host_span(positions), reports(chosen, ids, values));
                }
                const std::span<std::int32_t> chosen(tokens.data(), tokens.shape(0));
                const nb::gil_scoped_release release;
                self.run(plan, choosing, chosen);
            },
            "decode_count"_a, "row_slots"_a, "query_starts"_a, "context_lens"_a, "token_ids"_a,
            "sample_rows"_a, "groups"_a, "tokens"_a, "sampling"_a.none())
        .def("__len__", &cpu::StepRecording::size);
}
