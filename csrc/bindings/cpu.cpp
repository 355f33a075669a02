// Python module _cpu: tensors go down as addresses and shapes, nothing is computed here.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "errors.h"
#include "probes.h"
#include "runtime.h"

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
}
