// Feeds files to the fuzz target, and with `--random COUNT SEED` also inputs of its own making;
// `--write FOLDER` keeps the first few of those as a seed corpus. Needs no libFuzzer.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "last_words.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Input = std::vector<std::uint8_t>;

Input made(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    Input input(std::uniform_int_distribution<std::size_t>(1, 600)(random));
    // Half of the inputs ask for nothing outrageous: their bytes stay small.
    const int largest = seed % 2 == 0 ? 250 : 255;
    for (auto& byte : input) {
        byte = static_cast<std::uint8_t>(std::uniform_int_distribution<int>(0, largest)(random));
    }
    return input;
}

}  // namespace

int main(int count, char** arguments) {
    tokenspeed::proof::print_last_words_on_abort();
    long long inputs = 0;
    for (int i = 1; i < count; ++i) {
        const std::string argument = arguments[i];
        if (argument == "--random" && i + 2 < count) {
            const long long wanted = std::atoll(arguments[i + 1]);
            const std::uint64_t seed = std::strtoull(arguments[i + 2], nullptr, 10);
            for (long long n = 0; n < wanted; ++n, ++inputs) {
                const std::uint64_t own = seed + static_cast<std::uint64_t>(n);
                tokenspeed::proof::last_words_begin("fuzz input --random 1 " + std::to_string(own));
                const Input input = made(own);
                LLVMFuzzerTestOneInput(input.data(), input.size());
            }
            i += 2;
        } else if (argument == "--write" && i + 1 < count) {
            for (std::uint64_t seed = 0; seed < 8; ++seed) {
                const Input input = made(seed);
                std::ofstream file(arguments[i + 1] + ("/seed_" + std::to_string(seed)),
                                   std::ios::binary);
                file.write(reinterpret_cast<const char*>(input.data()),
                           static_cast<std::streamsize>(input.size()));
            }
            ++i;
        } else {
            std::ifstream file(argument, std::ios::binary);
            if (!file) {
                std::fprintf(stderr, "WRONG: %s cannot be read\n", argument.c_str());
                return 1;
            }
            const Input input((std::istreambuf_iterator<char>(file)), {});
            tokenspeed::proof::last_words_begin("fuzz input " + argument);
            LLVMFuzzerTestOneInput(input.data(), input.size());
            ++inputs;
        }
    }
    std::printf("replayed %lld inputs\n", inputs);
    return 0;
}
