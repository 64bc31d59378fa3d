"""corral's own CPU kernels: a library of custom operators for ONNX Runtime, in C++ (`src/`), and where it is."""

from corral.kernels.library import Library, find_library

__all__ = ["Library", "find_library"]
