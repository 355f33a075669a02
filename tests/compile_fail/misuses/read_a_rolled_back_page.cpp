// A page that only wrong guesses reached is nobody's: no step is shown it.
// wants: only open, sealed and drafts' pages are lent
void read(DraftPage<Full>&& page, const Verified& verified, StepId step,
          std::vector<InFlight<OpenPage<Full>>>& lent) {
    SettledPage<Full> settled = settle(std::move(page), 1, TokenCount(32), verified);
#ifdef MISUSE
    auto lease = lend(std::get<FreePage<Full>>(std::move(settled)), step);
    static_cast<void>(lent);
#else
    lent.push_back(lend(std::get<OpenPage<Full>>(std::move(settled)), step));
#endif
}
