"""The control plane's proof: C++ drivers, and the harness that builds, mutates and runs them."""
