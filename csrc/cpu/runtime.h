// What the kernels of one engine share: the build for this CPU, the threads, the memory.
#pragma once

#include <memory>
#include <optional>
#include <string_view>

#include "isa.h"
#include "memory.h"
#include "pool.h"

namespace tokenspeed::cpu {

class Runtime {
  public:
    // Throws ConfigError: an instruction set this CPU lacks, or a wrong number of threads.
    Runtime(int threads, std::optional<std::string_view> isa)
        : isa_(select_isa(isa)), arena_(std::make_shared<Arena>()), pool_(threads) {}

    const Isa& isa() const { return isa_; }
    const Kernels& kernels() const { return isa_.kernels; }
    ThreadPool& pool() { return pool_; }
    // Shared with the weights that lie in it.
    const std::shared_ptr<Arena>& arena() const { return arena_; }

  private:
    const Isa& isa_;
    std::shared_ptr<Arena> arena_;
    ThreadPool pool_;
};

}  // namespace tokenspeed::cpu
