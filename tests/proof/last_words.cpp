#include "last_words.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstddef>

namespace tokenspeed::proof {

namespace {

struct Words {
    std::array<char, 16384> text;
    std::size_t size = 0;

    void add(std::string_view more) {
        const std::size_t fits = std::min(more.size(), text.size() - size);
        std::copy_n(more.begin(), fits, text.begin() + static_cast<std::ptrdiff_t>(size));
        size += fits;
    }
};

// A signal handler is given no argument: the thread's own words must be found without one.
thread_local Words words;

void print(int signal) {
    words.add("\n");
    [[maybe_unused]] const auto written = write(STDERR_FILENO, words.text.data(), words.size);
    std::signal(signal, SIG_DFL);
    std::raise(signal);
}

}  // namespace

void last_words_begin(std::string_view subject) {
    words.size = 0;
    words.add(subject);
    words.add(":");
}

void last_words(std::string_view event) {
    words.add(" ");
    words.add(event);
    words.add(",");
}

void print_last_words_on_abort() {
    std::signal(SIGABRT, print);
}

}  // namespace tokenspeed::proof
