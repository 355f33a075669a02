// A ticket's pages go back once.
// wants: cannot bind rvalue reference of type '.*Admission&&' to lvalue
void forget(Admission ticket, Store& store) {
#ifdef MISUSE
    Admission::cancel(ticket, store);
#else
    Admission::cancel(std::move(ticket), store);
#endif
}
