// Python module _cpu: tensors are borrowed for the length of a call, nothing is computed here.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "errors.h"
#include "gemm.h"
#include "packed.h"
#include "probes.h"
#include "runtime.h"
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
    // Refers to torch, and is kept for as long as the process for that.
    static const auto& tensors = *new tokenspeed::bindings::TensorReader();  // NOLINT

    nb::class_<cpu::Runtime>(module, "Runtime")
        .def(nb::init<int, std::optional<std::string_view>>(), nb::kw_only(), "threads"_a,
             "isa"_a.none())
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
        .def_prop_ro("format", [](const cpu::PackedMatrix& self) { return self.format().name; })
        .def_prop_ro("outputs", &cpu::PackedMatrix::outputs)
        .def_prop_ro("inputs", &cpu::PackedMatrix::inputs)
        .def_prop_ro("size_bytes", &cpu::PackedMatrix::size_bytes);
    module.def(
        "linear",
        [](cpu::Runtime& runtime, nb::handle x, const std::vector<const cpu::PackedMatrix*>& weight,
           nb::handle bias, nb::handle y) {
            const auto x_rows = tensors.rows<const void*>(x, "x");
            const auto y_rows = tensors.rows<void*>(y, "y");
            const void* added = bias.is_none()
                                    ? nullptr
                                    : tensors.vector(bias, "bias", y_rows.columns, y_rows.type);
            const nb::gil_scoped_release release;
            cpu::linear(runtime, x_rows, weight, added, y_rows);
        },
        "runtime"_a, "x"_a, "weight"_a, "bias"_a.none(), "y"_a);
    module.def(
        "lookup",
        [](cpu::Runtime& runtime, nb::handle ids, const cpu::PackedMatrix& table, nb::handle y) {
            const auto rows = tensors.integers<std::int64_t>(ids, "ids");
            const auto y_rows = tensors.rows<void*>(y, "y");
            const nb::gil_scoped_release release;
            cpu::lookup(runtime, rows, table, y_rows);
        },
        "runtime"_a, "ids"_a, "table"_a, "y"_a);
}
