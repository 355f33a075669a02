// PyTorch's tensors as C++ sees them: borrowed for a call, never copied.
//
// A tensor's own `__dlpack__` runs Python and takes microseconds, which a decode step pays hundreds
// of times. DLPack's exchange interface (version 1.3), which PyTorch offers as a table of C
// functions, fills in a plain structure in some ten nanoseconds. Only what is used of the interface
// is declared here.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "errors.h"
#include "kernels.h"

namespace tokenspeed::bindings {

struct DLTensor {
    void* data;
    struct {
        std::int32_t type, id;
    } device;
    std::int32_t dims;
    struct {
        std::uint8_t code, bits;
        std::uint16_t lanes;
    } element;
    const std::int64_t* shape;
    const std::int64_t* strides;
    std::uint64_t offset_bytes;
};

class TensorReader {
  public:
    // The tensor behind an object, for as long as the object lives.
    DLTensor borrow(nanobind::handle object, const char* name) const {
        if (read_ == nullptr) connect();
        DLTensor tensor;
        if (PyObject_IsInstance(object.ptr(), tensor_type_.ptr()) != 1) {
            throw cpu::KernelError(std::string(name) + " must be a torch.Tensor");
        }
        if (read_(object.ptr(), &tensor) != 0) throw nanobind::python_error();
        if (tensor.device.type != host) {
            throw cpu::KernelError(std::string(name) + " must be on the CPU");
        }
        tensor.data = static_cast<std::byte*>(tensor.data) + tensor.offset_bytes;
        if (watcher_ != nullptr) {
            const nanobind::handle watcher(watcher_);
            watcher(reinterpret_cast<std::uintptr_t>(tensor.data));
        }
        return tensor;
    }

    // From now on tells a callable the address of every tensor that this thread borrows; None ends
    // it.
    static void watch(nanobind::handle watcher) {
        PyObject* const next = watcher.is_none() ? nullptr : watcher.inc_ref().ptr();
        Py_XDECREF(std::exchange(watcher_, next));
    }

    // A matrix of float32 or bfloat16 whose rows are contiguous.
    template <class Pointer>
    cpu::Rows<Pointer> rows(nanobind::handle object, const char* name) const {
        const DLTensor tensor = borrow(object, name);
        if (tensor.dims != 2 || (tensor.strides[1] != 1 && tensor.shape[1] > 1)) {
            throw cpu::KernelError(std::string(name) + " must be a matrix with contiguous rows");
        }
        return {tensor.data, element(tensor, name), tensor.shape[0], tensor.shape[1],
                tensor.strides[0]};
    }
    template <class Pointer>
    cpu::Rows<Pointer> rows(nanobind::handle object, const char* name, cpu::Element type) const {
        const auto found = rows<Pointer>(object, name);
        if (found.type != type) {
            throw cpu::KernelError(std::string(name) + " must be " +
                                   (type == cpu::Element::f32 ? "float32" : "bfloat16"));
        }
        return found;
    }

    // Room for quantised rows: contiguous bytes.
    std::span<std::byte> memory(nanobind::handle object, const char* name) const {
        const auto bytes = integers<std::uint8_t>(object, name);
        return {reinterpret_cast<std::byte*>(const_cast<std::uint8_t*>(bytes.data())),
                bytes.size()};
    }
    bool is_memory(nanobind::handle object, const char* name) const {
        const DLTensor tensor = borrow(object, name);
        return tensor.element.code == 1 && tensor.element.bits == 8;
    }

    // A contiguous tensor of float32, of `size` elements where that is given.
    std::span<float> floats(nanobind::handle object, const char* name,
                            std::optional<std::size_t> size = std::nullopt) const {
        const DLTensor tensor = borrow(object, name);
        std::int64_t found = 1;
        bool fits = element(tensor, name) == cpu::Element::f32;
        for (int dim = tensor.dims - 1; dim >= 0; --dim) {
            fits = fits && (tensor.strides[dim] == found || tensor.shape[dim] <= 1 || found == 0);
            found *= tensor.shape[dim];
        }
        if (!fits || (size && *size != static_cast<std::size_t>(found))) {
            throw cpu::KernelError(std::string(name) + " must be contiguous float32" +
                                   (size ? ", " + std::to_string(*size) + " of them" : ""));
        }
        return {static_cast<float*>(tensor.data), static_cast<std::size_t>(found)};
    }

    // A contiguous vector of so many float64.
    const double* doubles(nanobind::handle object, const char* name, std::size_t size) const {
        const DLTensor tensor = borrow(object, name);
        if (tensor.dims != 1 || tensor.element.code != 2 || tensor.element.bits != 64 ||
            static_cast<std::size_t>(tensor.shape[0]) != size ||
            (tensor.strides[0] != 1 && size > 1)) {
            throw cpu::KernelError(std::string(name) + " must be a contiguous vector of " +
                                   std::to_string(size) + " float64");
        }
        return static_cast<const double*>(tensor.data);
    }

    // Heads [tokens, heads, elements] of float32 or bfloat16 as a matrix with a row for each token:
    // the heads of a token lie one behind the other, tokens as far apart as they like.
    template <class Pointer>
    cpu::Rows<Pointer> heads(nanobind::handle object, const char* name) const {
        const DLTensor tensor = borrow(object, name);
        if (tensor.dims != 3 || tensor.strides[2] != 1 ||
            (tensor.strides[1] != tensor.shape[2] && tensor.shape[1] > 1)) {
            throw cpu::KernelError(std::string(name) +
                                   " must be [tokens, heads, elements], contiguous within a token");
        }
        return {tensor.data, element(tensor, name), tensor.shape[0],
                tensor.shape[1] * tensor.shape[2], tensor.strides[0]};
    }

    // K and V of a pool, contiguous [pages, page size, heads, elements] each. Elements that are
    // bytes have the four of their position's scale behind them.
    cpu::KvPages pages(nanobind::handle k, nanobind::handle v) const {
        const DLTensor keys = borrow(k, "K's pool"), values = borrow(v, "V's pool");
        const cpu::KvFormat format = kv_format(keys);
        for (const DLTensor& tensor : {keys, values}) {
            std::int64_t size = 1;
            bool fits = tensor.dims == 4 && kv_format(tensor) == format;
            for (int dim = 3; fits && dim >= 0; --dim) {
                fits = (dim == 3 || tensor.shape[dim] == keys.shape[dim]) &&
                       (tensor.strides[dim] == size || tensor.shape[dim] <= 1);
                size *= tensor.shape[dim];
            }
            if (!fits) {
                throw cpu::KernelError(
                    "the pools must be contiguous [pages, page size, heads, elements] of one "
                    "type, of as many pages, positions and heads");
            }
        }
        const std::int64_t beside = format == cpu::KvFormat::i8 ? sizeof(float) : 0;
        return {keys.data,
                values.data,
                format,
                keys.shape[0],
                keys.shape[1],
                keys.shape[2],
                keys.shape[3] - beside,
                values.shape[3] - beside};
    }

    // A pool of latents, contiguous [pages, page size, elements].
    cpu::LatentPages latents(nanobind::handle pool) const {
        const DLTensor tensor = borrow(pool, "the pool");
        std::int64_t size = 1;
        bool fits = tensor.dims == 3;
        for (int dim = 2; fits && dim >= 0; --dim) {
            fits = tensor.strides[dim] == size || tensor.shape[dim] <= 1;
            size *= tensor.shape[dim];
        }
        if (!fits) {
            throw cpu::KernelError("the pool must be contiguous [pages, page size, elements]");
        }
        return {tensor.data, element(tensor, "the pool"), tensor.shape[0], tensor.shape[1],
                tensor.shape[2]};
    }

    // A contiguous vector of `size` elements of a type.
    const void* vector(nanobind::handle object, const char* name, std::int64_t size,
                       cpu::Element type) const {
        const DLTensor tensor = borrow(object, name);
        if (tensor.dims != 1 || tensor.shape[0] != size || (tensor.strides[0] != 1 && size > 1) ||
            element(tensor, name) != type) {
            throw cpu::KernelError(std::string(name) + " must be a contiguous vector of " +
                                   std::to_string(size) + " elements of the right type");
        }
        return tensor.data;
    }

    cpu::Element type_of(nanobind::handle object, const char* name) const {
        return element(borrow(object, name), name);
    }

    // A contiguous tensor of integers of so many bytes each.
    template <class T>
    std::span<const T> integers(nanobind::handle object, const char* name) const {
        const DLTensor tensor = borrow(object, name);
        constexpr std::uint8_t code = std::is_signed_v<T> ? 0 : 1;
        std::int64_t size = 1;
        bool fits = tensor.element.code == code && tensor.element.bits == 8 * sizeof(T);
        for (int dim = tensor.dims - 1; dim >= 0; --dim) {
            fits = fits && (tensor.strides[dim] == size || tensor.shape[dim] <= 1 || size == 0);
            size *= tensor.shape[dim];
        }
        if (!fits) {
            throw cpu::KernelError(std::string(name) + " must be contiguous integers of " +
                                   std::to_string(sizeof(T)) + " bytes");
        }
        return {static_cast<const T*>(tensor.data), static_cast<std::size_t>(size)};
    }

  private:
    static constexpr std::int32_t host = 1;

    struct Exchange {
        std::uint32_t major, minor;
        const void* previous;
        const void* allocate;
        const void* own;
        const void* give;
        int (*borrow)(void* object, DLTensor* tensor);
    };

    // Imports torch: only now, because there are things to do here before that.
    void connect() const {
        namespace nb = nanobind;
        const nb::object type = nb::module_::import_("torch").attr("Tensor");
        const nb::object capsule = type.attr("__dlpack_c_exchange_api__");
        const auto* table = static_cast<const Exchange*>(
            PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (table == nullptr) throw nb::python_error();
        if (table->major != 1) throw nb::import_error("this PyTorch offers another DLPack than 1");
        tensor_type_ = type.inc_ref();
        read_ = table->borrow;
    }

    static cpu::KvFormat kv_format(const DLTensor& tensor) {
        if (tensor.element.code == 0 && tensor.element.bits == 8) return cpu::KvFormat::i8;
        return element(tensor, "a pool") == cpu::Element::f32 ? cpu::KvFormat::f32
                                                              : cpu::KvFormat::bf16;
    }

    static cpu::Element element(const DLTensor& tensor, const char* name) {
        if (tensor.element.code == 2 && tensor.element.bits == 32) return cpu::Element::f32;
        if (tensor.element.code == 4 && tensor.element.bits == 16) return cpu::Element::bf16;
        throw cpu::KernelError(std::string(name) + " must be float32 or bfloat16");
    }

    static inline thread_local PyObject* watcher_ = nullptr;
    mutable int (*read_)(void* object, DLTensor* tensor) = nullptr;
    mutable nanobind::handle tensor_type_;
};

}  // namespace tokenspeed::bindings
