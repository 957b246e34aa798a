"""Loops in C for CPUs: `build.py` compiles them, `bindings.py` is the one checked door to them."""
