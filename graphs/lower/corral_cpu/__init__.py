"""corral's own CPU kernels (kernels/); one operator a file."""
