// A ticket's pages go back once.
// wants: cannot bind rvalue reference of type '.*Admission&&' to lvalue
void forget(Admission ticket, Store& store) {
#ifdef MISUSE
    cancel(ticket, store);
#else
    cancel(std::move(ticket), store);
#endif
}
