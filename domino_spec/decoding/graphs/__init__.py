"""Static cycles, which never look at the device; CUDA captures them as graphs. The default path imports none of it."""
