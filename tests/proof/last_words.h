// What a thread was doing, for the line that is printed when an assertion stops the program.
#pragma once

#include <string_view>

namespace tokenspeed::proof {

// Starts anew; later words are appended.
void last_words_begin(std::string_view subject);
void last_words(std::string_view event);
// From now on, an abort prints the last words of its thread before the program ends.
void print_last_words_on_abort();

}  // namespace tokenspeed::proof
