// A link to a node is counted: a copy would be taken back twice.
// wants: use of deleted function '.*NodeRef::NodeRef\(const .*NodeRef&\)
void keep(Trail& trail, NodeRef& node) {
#ifdef MISUSE
    trail.push_back(node);
    NodeRef copy = node;
#else
    NodeRef copy = std::move(node);
#endif
    trail.push_back(std::move(copy));
}
