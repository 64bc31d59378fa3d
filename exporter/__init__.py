"""PyTorch -> ONNX: the custom ops, capture on fake weights, and the weight plan of a fresh export."""
