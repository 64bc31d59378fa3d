"""TensorRT's own layers, in the standard ONNX that its parser knows; one operator a file."""
