// A ticket to begin at once holds nothing to load.
// wants: invalid initialization of reference of type '.*LoadAdmission&&'
#ifdef MISUSE
using Wanted = Admission;
#else
using Wanted = LoadAdmission;
#endif
Loading begin(Queued&& request, Wanted&& ticket, Slot&& slot, TransferId transfer) {
    return load(std::move(request), std::move(ticket), std::move(slot), transfer);
}
