// Only a comparison of the samples with the draft itself says how far it was right.
// wants: Verified::Verified\(.*\).* is private within this context
Verified pretend(const Verifying& request, std::span<const std::int32_t> samples) {
#ifdef MISUSE
    return Verified(request.request->id(), samples, TokenCount(1), request.request->known());
#else
    return verify(request, samples, TokenCount(100));
#endif
}
