// A step writes its KV to the device.
// wants: no matching function for call to 'kv_slot\(.*Host
#ifdef MISUSE
using Tier = Host;
#else
using Tier = Device;
#endif
std::int32_t where(OpenPage<Full, Tier>&& page, StepId step) {
    const auto lease = lend(std::move(page), step);
    return kv_slot(lease, TokenCount(0), TokenCount(32));
}
