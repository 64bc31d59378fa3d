"""TensorRT engines of a lowered graph: built, checked, described. Written once for both of NVIDIA's modules."""
