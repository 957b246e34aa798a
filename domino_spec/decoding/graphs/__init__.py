"""Static cycles: the host never waits for the device, and CUDA runs them as graphs. Not on the default path."""
