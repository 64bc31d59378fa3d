"""TensorRT engines: the module behind the seam, the build, the kernels."""
