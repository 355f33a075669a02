// Counts of two kinds do not add up.
// wants: no match for 'operator\+' in 'pages \+ tokens'
PageCount sum(PageCount pages, TokenCount tokens) {
#ifdef MISUSE
    return pages + tokens;
#else
    return pages + pages_for(tokens, TokenCount(32));
#endif
}
