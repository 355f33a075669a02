// A slot is not a page, though both are numbers.
// wants: no match for 'operator==' in 'page == slot'
bool same(PageId page, SlotId slot) {
#ifdef MISUSE
    return page == slot;
#else
    return page == PageId(slot.value);
#endif
}
