"""ONNX Runtime kernels; one operator a file."""
