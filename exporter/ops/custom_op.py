"""What a custom op is made of: the leaf of the model it stands for, the node, and the fallback body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx.parser
import onnx_ir as ir
from torch import nn

from corral.spec.model_config import ModelConfig

DOMAIN = "corral"
VERSION = 1
OPSET = 24  # of the default domain, for the fallback bodies: TensorScatter


@dataclass(frozen=True, kw_only=True)
class CustomOp:
    """`leaf` modules of the model become `node` modules while capturing; `bodies` say what they mean in standard ops."""

    leaf: type[nn.Module]
    node: Callable[[Any], nn.Module]
    bodies: Callable[[ModelConfig], list[ir.Function]]


def parse_body(name: str, signature: str, body: str) -> ir.Function:
    """An ONNX function from its text form (ONNX IR spec, "textual syntax")."""
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'
    function = ir.from_proto(onnx.parser.parse_function(f"{header}\n{name} {signature}\n{{\n{body}\n}}"))
    assert isinstance(function, ir.Function)
    return function
