// Numbers of pages of two groups are numbers of different things.
// wants: no match for 'operator==' in 'full == window'
bool same(PageId<Full> full, PageId<Window> window) {
#ifdef MISUSE
    return full == window;
#else
    return full == PageId<Full>(window.value);
#endif
}
