"""Checkpoints quantized in the compressed-tensors format, as llm-compressor writes them: FP8, and int4 packed in int32.

    float-quantized, naive-quantized    X.weight float8_e4m3fn [outputs, inputs]
    pack-quantized                      X.weight_packed int32 [outputs, inputs / 8], X.weight_shape [2]
    both                                X.weight_scale; of asymmetric int4 X.weight_zero_point int32 [outputs / 8, groups]

Where that is from, in the library's sources (compressed-tensors 0.20): the names, `compression_param_names` of
`compressors/pack_quantized/base.py` and `compressors/naive_quantized/base.py`; eight codes in a word, the first in the
lowest bits, code - 8, zero points packed along the outputs, `pack_to_int32` in `compressors/pack_quantized/helpers.py`;
the scales' shapes, `initialize_qparams` in `quantization/lifecycle/initialize.py`: "expected_shape = (1,)" for a tensor,
(outputs, 1) for a channel, (outputs, ceil(inputs / group_size)), and for blocks the number of them on each axis.

`meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8` is such a checkpoint. vLLM, given it, reports its scheme (vllm-project/
vllm issue 16474): weights "num_bits=8 type='float' symmetric=True strategy='channel' dynamic=False", activations
"strategy='token' dynamic=True". That its routed experts are stored one by one, with a `weight_scale` [outputs, 1] each,
and everything else in 16 bits, is read off vLLM's `tests/models/multimodal/generation/test_maverick.py`.

Which modules are quantized is what the tensors say: `targets` and `ignore`, patterns over names that loaders respell,
are not consulted. That a tensor fits one of `config_groups` is checked. Scales of activations are dropped (`names.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corral.model.checkpoint.names import is_dropped
from corral.model.checkpoint.quantized import CODES_PER_WORD, QuantizedMatrix, QuantizedStore
from corral.model.checkpoint.store import Complaints, TensorInfo, TensorStore
from corral.spec.errors import InputError
from corral.spec.quant_scheme import in_words
from corral.spec.typed_json import TypedJson

# format -> (type, bits) of its weights, and whether they are packed.
FORMATS = {
    "float-quantized": ("float", 8, False),
    "naive-quantized": ("float", 8, False),  # the same, without activations being quantized
    "pack-quantized": ("int", 4, True),
}
STRATEGIES = {False: ("tensor", "channel", "block"), True: ("group", "channel")}
FP8, PACKED_DTYPE, SCALE_DTYPES = "float8_e4m3fn", "int32", ("bfloat16", "float16", "float32")
WEIGHT, PACKED, SCALE, SHAPE, ZERO_POINT = (
    ".weight", ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one group of modules is quantized."""

    packed: bool
    strategy: str
    symmetric: bool
    group: tuple[int, int] | None  # outputs and inputs that share a scale, where the strategy leaves that open

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Outputs and inputs that share a scale, in a matrix of `shape`."""
        return self.group or {"tensor": shape, "channel": (1, shape[1])}[self.strategy]

    def scale_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        """What the scales of a matrix of `shape` may look like."""
        if self.strategy == "tensor":
            return (1,), ()
        rows, columns = self.block(shape)
        return ((-(-shape[0] // rows), -(-shape[1] // columns)),)

    @property
    def published(self) -> str:
        """In the words of `in_words` where those say it all."""
        if self.strategy == "group":
            assert self.group is not None
            words = in_words("int4", self.group[1])
        else:
            per = f"{self.group[0]}x{self.group[1]} block" if self.group else self.strategy
            words = f"{'int4' if self.packed else 'fp8'} per {per.replace('channel', 'output')}"
        return words if self.symmetric else f"{words} asymmetric"


def open_compressed_tensors(
    store: TensorStore, quantization: dict[str, Any], where: str, complaints: Complaints
) -> QuantizedStore:
    """`store` with every quantized matrix as one tensor X.weight. Adds to `complaints` what does not fit together.

    Raises InputError where `quantization` (config.json's `quantization_config`) is of a kind that is not read.
    """
    schemes = read_schemes(quantization, where)
    tensors, matrices = dict(store.tensors), {}
    for name, codes in store.tensors.items():
        packed = name.endswith(PACKED)
        if is_dropped(name) or not (packed or (name.endswith(WEIGHT) and codes.dtype == FP8)):
            continue
        module = name.removesuffix(PACKED if packed else WEIGHT)
        others = [tensors.pop(module + last) for last in (SCALE, ZERO_POINT, SHAPE) if module + last in tensors]
        del tensors[name]
        fitting = [scheme for scheme in schemes if scheme.packed == packed]
        scheme = fitting[0] if fitting else None
        shape = (*codes.shape[:-1], *(n * (CODES_PER_WORD if packed else 1) for n in codes.shape[-1:]))
        try:
            scheme, matrices[module + WEIGHT] = _matrix(store, module, codes, shape, fitting)
        except _Unfit as unfit:  # and it stands there as if it did fit, so that one defect is told once
            complaints.setdefault(unfit.what, []).append(unfit.words)
        published = scheme.published if scheme else ""
        tensors[module + WEIGHT] = TensorInfo(
            module + WEIGHT, codes.file, "float32", shape, published, (codes, *others)
        )
    if idle := [name for name in tensors if name.endswith(SCALE) and not is_dropped(name)]:
        complaints["scales of weights that are not quantized"] = idle
        for name in idle:
            del tensors[name]
    return QuantizedStore(store, matrices, tensors)


def read_schemes(quantization: dict[str, Any], where: str) -> list[Scheme]:
    """The schemes of `config_groups`. Raises InputError for every kind that is not read, by its name."""
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        raise InputError(f'{where}: quantization_status is "{str(status)[:80]}", expected "compressed" weights.')
    for key in ("sparsity_config", "transform_config"):
        value = quantization.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise InputError(f"{where}: {key} is {str(value)[:80]}; corral reads weights without one.")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise InputError(f"{where}: config_groups is {str(groups)[:80]}, expected an object of groups with weights.")
    return [
        _read_scheme(group["weights"], str(group.get("format") or quantization.get("format")), f"{where}: {name[:80]}")
        for name, group in groups.items()
        if group.get("weights") is not None
    ]


def _read_scheme(weights: Any, form: str, where: str) -> Scheme:
    if form not in FORMATS:
        raise InputError(f'{where}: format is "{form[:80]}"; corral reads {", ".join(FORMATS)}.')
    if not isinstance(weights, dict):
        raise InputError(f"{where}: weights is {str(weights)[:80]}, expected an object.")
    kind, bits, packed = FORMATS[form]
    read = TypedJson(weights, f"{where}: weights")
    strategy = weights.get("strategy") or _default_strategy(weights.get("group_size"))
    if weights.get("type", "int") != kind or read.integer("num_bits", 8) != bits or strategy not in STRATEGIES[packed]:
        raise InputError(
            f"{where}: weights of type {str(weights.get('type'))[:20]}, {str(weights.get('num_bits'))[:20]} bits, strategy "
            f"{str(strategy)[:20]}; in {form} corral reads {kind}, {bits} bits, strategy {' or '.join(STRATEGIES[packed])}."
        )
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise InputError(
            f"{where}: actorder is {str(weights['actorder'])[:80]}: inputs are stored in another order (weight_g_idx), "
            'which corral does not read; it reads actorder "weight", and weights without any.'
        )
    symmetric = read.flag("symmetric", True)
    if not (symmetric or packed):
        raise InputError(f"{where}: weights in {form} are not symmetric, expected symmetric ones.")
    return Scheme(packed=packed, strategy=strategy, symmetric=symmetric, group=_group(read, strategy))


def _default_strategy(group_size: Any) -> str:
    """As in the library's `QuantizationArgs`: "infer strategy"."""
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"


def _group(read: TypedJson, strategy: str) -> tuple[int, int] | None:
    if strategy == "group":
        size = read.integer("group_size")
        if size == 0:
            raise read.refuse("group_size", "a positive number of inputs")
        return 1, size
    if strategy == "block":
        block = read.integers("block_structure")
        if block is None or len(block) != 2 or 0 in block:
            raise read.refuse("block_structure", "a list of two positive numbers")
        return block[0], block[1]
    return None


class _Unfit(Exception):
    """Tensors of a module that do not fit together: what is wrong, and which."""

    def __init__(self, what: str, words: str) -> None:
        self.what, self.words = what, words


def _matrix(
    store: TensorStore, module: str, codes: TensorInfo, shape: tuple[int, ...], schemes: Sequence[Scheme]
) -> tuple[Scheme, QuantizedMatrix]:
    """A module's matrix, of `shape`, and which of `schemes` it is of. Raises _Unfit."""
    packed = codes.name.endswith(PACKED)
    scales, zero_points, said = (store.tensors.get(module + last) for last in (SCALE, ZERO_POINT, SHAPE))
    if len(shape) != 2 or 0 in shape or (packed and codes.dtype != PACKED_DTYPE):
        raise _Unfit("not stored as quantized matrices are", f"{codes.name} {codes.dtype} {list(codes.shape)}")
    matrix = shape[0], shape[1]
    if scales is None:
        raise _Unfit("quantized without scales", f"{codes.name} lacks {SCALE[1:]}")
    if scales.dtype not in SCALE_DTYPES:
        raise _Unfit(f"scales of another dtype than {', '.join(SCALE_DTYPES)}", f"{scales.name} {scales.dtype}")
    scheme = next((scheme for scheme in schemes if scales.shape in scheme.scale_shapes(matrix)), None)
    if scheme is None:
        expected = " or ".join(str(list(scheme.scale_shapes(matrix)[0])) for scheme in schemes)
        words = f"{scales.name} {list(scales.shape)} not {expected or 'quantized at all'}"
        raise _Unfit("scales of another shape than quantization_config says", words)
    _check_zero_points(module, zero_points, scheme, (-(-matrix[0] // CODES_PER_WORD), *scales.shape[1:]))
    if said is not None:
        _check_shape(store, said, matrix)
    return scheme, QuantizedMatrix(
        codes=codes.name,
        scales=scales.name,
        block=scheme.block(matrix),
        packed=packed,
        zero_points=zero_points.name if zero_points else None,
    )


def _check_zero_points(module: str, zero_points: TensorInfo | None, scheme: Scheme, shape: tuple[int, ...]) -> None:
    if scheme.symmetric != (zero_points is None):
        words = f"{module}{ZERO_POINT} {'beside symmetric weights' if scheme.symmetric else 'is missing'}"
        raise _Unfit("zero points that do not fit quantization_config", words)
    if zero_points is not None and (zero_points.dtype, zero_points.shape) != (PACKED_DTYPE, shape):
        words = f"{zero_points.name} {zero_points.dtype} {list(zero_points.shape)} not {PACKED_DTYPE} {list(shape)}"
        raise _Unfit("zero points of another shape", words)


def _check_shape(store: TensorStore, said: TensorInfo, matrix: tuple[int, int]) -> None:
    """Two numbers: the only tensors whose data is read when a checkpoint is opened."""
    found = store.read_slice(said.name, ()).tolist() if said.shape == (2,) else f"of shape {list(said.shape)}"
    if found != list(matrix):
        raise _Unfit("weight_shape that disagrees", f"{said.name} {str(found)[:80]} not {list(matrix)}")
