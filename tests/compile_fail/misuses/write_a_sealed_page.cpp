// A sealed page is shared: nothing may tell a step to write to it.
// wants: no matching function for call to 'kv_slot\(.*SealedKind
std::int32_t where(OpenPage<Full>&& page, const Retired& done, StepId step) {
#ifdef MISUSE
    const auto lease = lend(seal(std::move(page), done), step);
#else
    static_cast<void>(done);
    const auto lease = lend(std::move(page), step);
#endif
    return kv_slot(lease, TokenCount(0), TokenCount(32));
}
