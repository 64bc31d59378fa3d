"""Sessions and caches on a GPU: TensorRT engines, and ONNX Runtime with CUDA."""
