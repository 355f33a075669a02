// A slot is not a page, though both are numbers.
// wants: no match for 'operator==' in 'page == slot'
bool same(PageId<Full> page, SlotId slot) {
#ifdef MISUSE
    return page == slot;
#else
    return page == PageId<Full>(slot.value);
#endif
}
