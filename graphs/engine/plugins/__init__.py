"""Plugins for TensorRT proper: kernels that an engine carries as PTX, without Python. Not executed yet."""
