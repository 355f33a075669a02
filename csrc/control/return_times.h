// When sessions come back: learned, as they do, from how long others were away.
//
// A session is away from the end of an answer to its next prompt: mostly the run time of a tool.
// Three things are learned. How long sessions stay away after an answer of so many tokens; by what
// factor one session is slower than others; and, for sessions of about the same expected wait (a
// class), how many of those away for so long came back before as long again (hazards, with those
// that never came counted for as long as they were watched). From the hazards follows what a page
// of an absent session is worth: the best ratio, over all times to give up, of the chance that it
// comes back by then to the time the page is held until either happens (J. C. Gittins, Bandit
// processes and dynamic allocation indices, Journal of the Royal Statistical Society B 41(2),
// 1979).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace tokenspeed::control {

class ReturnTimes {
  public:
    // Classes are half octaves of the expected wait, from 1/8 s to 23 s and more; one more is for
    // what a session left behind.
    static constexpr std::int32_t kWaits = 16;
    static constexpr std::int32_t kLeft = kWaits;
    static constexpr std::int32_t kClasses = kWaits + 1;
    // Bins of time away: quarter octaves from 1/4 s to 34 min, with the rest at either end.
    static constexpr std::int32_t kBins = 54;

    ReturnTimes();

    // The class of a session that answered `outputs` tokens; `pace` is what `learn` made of it.
    std::int32_t wait_class(std::int64_t outputs, double pace) const noexcept;
    static std::int32_t bin(std::int64_t away_us) noexcept;
    // When a stay in a bin ends; the last one never does.
    static std::int64_t bin_end_us(std::int32_t bin) noexcept;

    // A session of the class is away for as long as the bin says.
    void watched(std::int32_t wait_class, std::int32_t bin) noexcept;
    // It came back. Call `watched` for this bin and all before it first.
    void returned(std::int32_t wait_class, std::int32_t bin) noexcept;
    // A session came back: what it teaches of answers of that length, and the session's new pace.
    double learn(std::int64_t outputs, double pace, std::int64_t away_us) noexcept;

    // What holding a page of such a session is worth: hits a second.
    double worth(std::int32_t wait_class, std::int32_t bin) const noexcept {
        return worth_[at(wait_class)][at(bin)];
    }

    // For fingerprints: appends what was learned, the counts that are not as they were at first
    // among them. What a page is worth follows from the counts, or lags behind by `news_`.
    void describe(std::vector<std::int64_t>& words) const;

  private:
    static constexpr std::int32_t kLengths = 18;  // half octaves of answers, from 16 tokens
    static std::int32_t length_class(std::int64_t outputs) noexcept;
    static constexpr std::size_t at(std::int32_t index) noexcept {
        return static_cast<std::size_t>(index);
    }
    void age(std::int32_t wait_class) noexcept;
    void refit(std::int32_t wait_class) noexcept;

    template <class T>
    using Table = std::array<std::array<T, kBins>, kClasses>;
    Table<double> watched_{}, returned_{}, worth_{};
    std::array<std::int32_t, kClasses> news_{};
    std::array<double, kLengths> log_wait_{};  // natural logarithm of seconds
    std::array<std::int32_t, kLengths> seen_{};
};

}  // namespace tokenspeed::control
