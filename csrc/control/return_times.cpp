#include "return_times.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>

namespace tokenspeed::control {

namespace {

constexpr double kFirstBinS = 0.25;  // where the first bin ends
constexpr double kBinsAnOctave = 4;
constexpr double kFirstWaitS = 0.125;  // the centre of the first class
constexpr double kWaitsAnOctave = 2;

// Before anything was seen: waits spread around the expected one, as if four sessions had been
// watched, of which one in twenty never came back; of what was left behind, one in twenty did.
constexpr double kPriorSessions = 4;
constexpr double kPriorReturn = 0.95;
constexpr double kPriorSpread = 0.8;
constexpr double kPriorWaitS = 6;

// Of a class, about the last thousand stays count; its worth is found anew after every eighth news.
constexpr double kStaysMax = 1024;
constexpr std::int32_t kNewsMax = 8;

// How fast an expectation follows: of a length of answers, of one session. A stray counts for no
// more than a factor of e.
constexpr double kLengthRate = 0.05;
constexpr double kPaceRate = 0.2;
constexpr double kSurpriseMax = 1;

double bin_start_s(std::int32_t bin) {
    return bin == 0 ? 0 : kFirstBinS * std::exp2((bin - 1) / kBinsAnOctave);
}

double normal_cdf(double x) {
    return 0.5 * std::erfc(-x / std::numbers::sqrt2);
}

}  // namespace

ReturnTimes::ReturnTimes() {
    log_wait_.fill(std::log(kPriorWaitS));
    for (std::int32_t c = 0; c < kClasses; ++c) {
        const double returns = c == kLeft ? 1 - kPriorReturn : kPriorReturn;
        const double centre =
            c == kLeft ? kPriorWaitS : kFirstWaitS * std::exp2(c / kWaitsAnOctave);
        const auto back_by = [&](double s) {
            return s > 0 ? returns * normal_cdf(std::log(s / centre) / kPriorSpread) : 0;
        };
        for (std::int32_t b = 0; b < kBins; ++b) {
            const double start = back_by(bin_start_s(b)), end = back_by(bin_start_s(b + 1));
            watched_[at(c)][at(b)] = kPriorSessions * (1 - start);
            returned_[at(c)][at(b)] = kPriorSessions * (end - start);
        }
        refit(c);
    }
}

std::int32_t ReturnTimes::length_class(std::int64_t outputs) noexcept {
    const auto tokens = static_cast<std::uint64_t>(std::clamp<std::int64_t>(outputs, 16, 8191));
    const int octave = std::bit_width(tokens) - 1;
    return 2 * (octave - 4) + static_cast<std::int32_t>((tokens >> (octave - 1)) & 1);
}

std::int32_t ReturnTimes::wait_class(std::int64_t outputs, double pace) const noexcept {
    const double wait_s = std::exp(log_wait_[at(length_class(outputs))] + pace);
    const double place = kWaitsAnOctave * std::log2(wait_s / kFirstWaitS);
    return static_cast<std::int32_t>(std::clamp(std::round(place), 0.0, kWaits - 1.0));
}

std::int32_t ReturnTimes::bin(std::int64_t away_us) noexcept {
    const double away_s = static_cast<double>(away_us) * 1e-6;
    if (away_s < kFirstBinS) return 0;
    const double place = 1 + kBinsAnOctave * std::log2(away_s / kFirstBinS);
    return static_cast<std::int32_t>(std::min(place, kBins - 1.0));
}

std::int64_t ReturnTimes::bin_end_us(std::int32_t bin) noexcept {
    if (bin == kBins - 1) return std::numeric_limits<std::int64_t>::max();
    return static_cast<std::int64_t>(std::ceil(bin_start_s(bin + 1) * 1e6));
}

void ReturnTimes::watched(std::int32_t wait_class, std::int32_t bin) noexcept {
    watched_[at(wait_class)][at(bin)] += 1;
    if (bin == 0) age(wait_class);
}

void ReturnTimes::returned(std::int32_t wait_class, std::int32_t bin) noexcept {
    returned_[at(wait_class)][at(bin)] += 1;
    age(wait_class);
}

void ReturnTimes::age(std::int32_t wait_class) noexcept {
    if (++news_[at(wait_class)] < kNewsMax) return;
    news_[at(wait_class)] = 0;
    if (watched_[at(wait_class)][0] > kStaysMax) {
        for (double& count : watched_[at(wait_class)]) count /= 2;
        for (double& count : returned_[at(wait_class)]) count /= 2;
    }
    refit(wait_class);
}

double ReturnTimes::learn(std::int64_t outputs, double pace, std::int64_t away_us) noexcept {
    const std::size_t length = at(length_class(outputs));
    const double log_away = std::log(std::max(static_cast<double>(away_us) * 1e-6, 0.01));
    const double surprise =
        std::clamp(log_away - log_wait_[length] - pace, -kSurpriseMax, kSurpriseMax);
    seen_[length] += seen_[length] < 1000 ? 1 : 0;
    log_wait_[length] += std::max(kLengthRate, 1.0 / seen_[length]) * surprise;
    return pace + kPaceRate * surprise;
}

void ReturnTimes::describe(std::vector<std::int64_t>& words) const {
    const auto tell = [&](std::size_t place, double now) {
        words.push_back(static_cast<std::int64_t>(place));
        words.push_back(std::bit_cast<std::int64_t>(now));
    };
    static const ReturnTimes prior;
    for (std::size_t c = 0; c < at(kClasses); ++c) {
        for (std::size_t b = 0; b < at(kBins); ++b) {
            const std::size_t place = c * at(kBins) + b;
            if (watched_[c][b] != prior.watched_[c][b]) tell(place, watched_[c][b]);
            if (returned_[c][b] != prior.returned_[c][b]) tell(place, returned_[c][b]);
            if (worth_[c][b] != prior.worth_[c][b]) tell(place, worth_[c][b]);
        }
        words.push_back(news_[c]);
    }
    for (std::size_t length = 0; length < at(kLengths); ++length) {
        tell(length, log_wait_[length]);
        words.push_back(seen_[length]);
    }
}

void ReturnTimes::refit(std::int32_t wait_class) noexcept {
    const auto& watched = watched_[at(wait_class)];
    const auto& returned = returned_[at(wait_class)];
    for (std::int32_t from = 0; from < kBins; ++from) {
        double away = 1, back = 0, held_s = 0, best = 0;
        for (std::int32_t b = from; b < kBins; ++b) {
            const double hazard =
                watched[at(b)] > 0 ? std::min(1.0, returned[at(b)] / watched[at(b)]) : 0;
            const double comes = away * hazard;
            back += comes;
            held_s += (away - comes / 2) * (bin_start_s(b + 1) - bin_start_s(b));
            away -= comes;
            best = std::max(best, back / held_s);
        }
        worth_[at(wait_class)][at(from)] = best;
    }
}

}  // namespace tokenspeed::control
