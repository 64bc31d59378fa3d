"""The reference Llama 4 in PyTorch, and the reading of its checkpoints. Knows nothing of export."""
