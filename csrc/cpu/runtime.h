// What the kernels of one engine share: the build for this CPU, the threads, the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "pool.h"

namespace tokenspeed::cpu {

// A kernel's call that was recorded: for how many rows, and its work on the first `rows` rows of
// its operands, which lie where they lay when it was called.
struct Call {
    using Work = std::function<void(std::int64_t rows)>;
    std::int64_t rows;
    Work work;
};

class Runtime {
  public:
    // Weights go to `memory`, or to an arena of its own where that is null. Throws ConfigError: an
    // instruction set this CPU lacks, or a wrong number of threads.
    Runtime(int threads, std::optional<std::string_view> isa,
            std::shared_ptr<Arena> memory = nullptr)
        : isa_(select_isa(isa)),
          arena_(memory ? std::move(memory) : std::make_shared<Arena>()),
          pool_(threads),
          scratch_(scratch_arena_.allocate(kernels().scratch_size_bytes *
                                           static_cast<std::size_t>(threads))) {}

    const Isa& isa() const { return isa_; }
    const Kernels& kernels() const { return isa_.kernels; }
    ThreadPool& pool() { return pool_; }
    // Shared with the weights that lie in it.
    const std::shared_ptr<Arena>& arena() const { return arena_; }

    // Does the work of a kernel, or keeps it for later while a step is recorded: then `work` is
    // done for other steps, so whatever depends on values that operands have belongs in it.
    template <class Work>
    void perform(std::int64_t rows, const Work& work) {
        if (recording_ != nullptr) {
            recording_->push_back({rows, work});
        } else {
            work(rows);
        }
    }
    // Where calls are kept from now on, instead of being done; null to do them again.
    void record(std::vector<Call>* calls) { recording_ = calls; }

    // A thread's own memory within a chunk of a job, of `kernels().scratch_size_bytes`.
    std::byte* scratch(int thread) {
        return scratch_.data() + kernels().scratch_size_bytes * static_cast<std::size_t>(thread);
    }

    // Memory for what an operation keeps between its jobs. One operation holds it at a time;
    // it is kept for the next one.
    class Lease {
      public:
        explicit Lease(Runtime& runtime) : runtime_(runtime), lock_(runtime.operation_) {}
        // Uninitialised and aligned to 64 bytes; takes the place of an earlier one.
        std::byte* memory(std::size_t size_bytes) const {
            auto& kept = runtime_.memory_;
            if (kept.size() * sizeof(Line) < size_bytes) {
                kept = {};
                kept.resize((size_bytes + sizeof(Line) - 1) / sizeof(Line));
            }
            return kept.data()->bytes;
        }

      private:
        Runtime& runtime_;
        std::unique_lock<std::mutex> lock_;
    };
    Lease lease() { return Lease(*this); }

  private:
    const Isa& isa_;
    std::shared_ptr<Arena> arena_;
    ThreadPool pool_;
    Arena scratch_arena_;
    std::span<std::byte> scratch_;
    std::vector<Call>* recording_ = nullptr;
    std::mutex operation_;
    struct alignas(64) Line {
        std::byte bytes[64];
    };
    std::vector<Line> memory_;
};

}  // namespace tokenspeed::cpu
