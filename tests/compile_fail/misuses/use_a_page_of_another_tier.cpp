// A page of the host is no page of the device.
// wants: no matching function for call to '.*PagePool<.*Full, .*Device>::give\(.*Host
void free(OpenPage<Full, Host>&& page, PagePool<Full, Device>& device, PagePool<Full, Host>& host) {
#ifdef MISUSE
    static_cast<void>(host);
    device.give(std::move(page));
#else
    static_cast<void>(device);
    host.give(std::move(page));
#endif
}
