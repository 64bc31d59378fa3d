"""Lowering per target: what replaces a `corral` node there."""
