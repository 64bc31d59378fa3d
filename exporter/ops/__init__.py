"""Llama 4's own two operators in the ONNX domain `corral`; one file each, and this table of them."""

from corral.exporter.ops import attention, moe
from corral.exporter.ops.custom_op import CustomOp

CUSTOM_OPS: tuple[CustomOp, ...] = (attention.OP, moe.OP)
