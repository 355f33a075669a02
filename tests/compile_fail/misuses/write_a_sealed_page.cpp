// A sealed page is shared: nothing may tell a step to write to it.
// wants: invalid initialization of reference of type 'const .*InFlight<.*Open
std::int32_t where(OpenPage&& page, const Retired& done, StepId step) {
#ifdef MISUSE
    const auto lease = lend(seal(std::move(page), done), step);
#else
    static_cast<void>(done);
    const auto lease = lend(std::move(page), step);
#endif
    return kv_slot(lease, TokenCount(0), TokenCount(32));
}
