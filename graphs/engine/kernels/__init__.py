"""CUDA kernels of the routed experts: their sources, how they are compiled, how they are launched."""
