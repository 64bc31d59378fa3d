"""What to make of a checkpoint: TOML <-> dataclass. The keys are the options of `corral compile`, and `rules`."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.spec import cpu_ops
from corral.spec.errors import InputError
from corral.spec.gpus import capability_of
from corral.spec.quant_scheme import DEFAULT_GROUP_SIZE, GROUP_SIZES, scheme_named
from corral.spec.rule import Rule
from corral.spec.target import TARGETS, check_capability, target_named

METHODS = ("rtn", "rtn-mse", "hqq", "awq", "gptq")
SCALES_INPUTS = "awq"  # the method that scales what several matrices read
LEAST_CALIBRATION_TOKENS = 512
KV_CACHES = ("float", "int8", "int4")
ENGINE_KEYS = ("gpu", "max_context", "max_batch", "weight_streaming", "expert_tiles")
DEFAULT_MAX_CONTEXT, DEFAULT_MAX_BATCH = 8192, 8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a bundle's bytes, apart from the checkpoint. Validated when made."""

    target: str = "cpu"
    weights: str = "int4"
    method: str = "rtn"
    group_size: int = DEFAULT_GROUP_SIZE
    asymmetric: bool = False  # each group of codes has a zero point of its own
    kernels: str = "stock"  # never what this machine happens to have: the same recipe gives the same bytes everywhere
    kv: str = "float"  # the KV cache: in the target's float type, or with kernels "corral" in int8 or int4
    calibration: str = "python-library"  # of calibrated methods and fp8: a UTF-8 file, or a text that corral ships
    calibration_tokens: int = 65536  # of it, at most
    stages: int = 1  # ranges of layers, each with a graph and weight shards of its own
    stage_gb: int = 0  # as many more that no stage's weights exceed this; 0: no limit
    requantize: bool = False  # weights that the checkpoint stores quantized in another way may be quantized again
    gpu: str = ""  # of engines: GPUs or compute capabilities, by comma
    max_context: int = DEFAULT_MAX_CONTEXT  # of engines: rows of a global layer's cache
    max_batch: int = DEFAULT_MAX_BATCH  # of engines: sequences that decode together
    expert_tiles: int = 0  # of engines: tiles of the experts' columns; 0: as the GPU's cache wants, or 1 without a GPU
    weight_streaming: bool = False  # of engines: part of the weights may stay in the host's memory
    rules: tuple[Rule, ...] = ()  # matrices that are stored otherwise; a later rule beats an earlier one

    def __post_init__(self) -> None:
        target, scheme = target_named(self.target), scheme_named(self.weights)
        if scheme.name not in target.all_weights:
            raise InputError(
                f"target {target.name} does not take {scheme.name} weights; it takes {', '.join(target.all_weights)}."
            )
        if self.method not in METHODS:
            raise InputError(f'method "{self.method}" is not known; expected one of {", ".join(METHODS)}.')
        if self.method != "rtn" and not scheme.takes_methods:
            raise InputError(
                f"method {self.method} chooses codes for groups of weights, and {scheme.name} has no groups. Leave the "
                "method out, or name it in a rule for the matrices that it is for."
            )
        if self.calibration_tokens < LEAST_CALIBRATION_TOKENS:
            raise InputError(
                f"calibration_tokens is {self.calibration_tokens}, expected at least {LEAST_CALIBRATION_TOKENS}."
            )
        if self.group_size not in GROUP_SIZES:
            raise InputError(f"group_size is {self.group_size!r}, expected one of {', '.join(map(str, GROUP_SIZES))}.")
        if self.asymmetric and not scheme.takes_zero_points:
            raise InputError(
                f"asymmetric codes have up to 4 bits, and {scheme.name} weights were asked for. Leave asymmetric out, or say "
                "it in a rule for matrices of int4."
            )
        if self.asymmetric and not target.zero_points:
            able = ", ".join(other.name for other in TARGETS.values() if other.zero_points)
            raise InputError(
                f"the kernels of target {target.name} take no zero points. Leave asymmetric out, or use target {able}."
            )
        if self.kernels not in target.kernels:
            raise InputError(
                f'kernels "{self.kernels}" are not known for target {target.name}; expected one of '
                f"{', '.join(target.kernels)}."
            )
        if scheme.name not in target.kernels[self.kernels]:
            able = [kernels for kernels, schemes in target.kernels.items() if scheme.name in schemes]
            raise InputError(
                f'kernels "{self.kernels}" compute {", ".join(target.kernels[self.kernels])} weights, not {scheme.name}. '
                f"Use --kernels {' or '.join(able)}."
            )
        if self.kv not in KV_CACHES:
            raise InputError(f'kv "{self.kv}" is not known; expected one of {", ".join(KV_CACHES)}.')
        if self.kv != "float" and self.kernels != "corral":
            raise InputError(
                f"a KV cache in {self.kv} is read by corral's CPU kernels only; target {target.name} with "
                f"{self.kernels} kernels stores it in {target.kv_dtype}. Use --target cpu --kernels corral, or --kv float."
            )
        if self.stages < 1 or self.stage_gb < 0:
            raise InputError(
                f"stages is {self.stages} and stage_gb {self.stage_gb}; expected at least 1 stage, and a limit in GB "
                "or 0 for none."
            )
        for key in ("max_context", "max_batch"):
            if not 1 <= getattr(self, key) < 1 << 31:
                raise InputError(f"{key} is {getattr(self, key)}, expected a whole number of at least 1.")
        if self.expert_tiles < 0:
            raise InputError(f"expert_tiles is {self.expert_tiles}, expected a number of tiles, or 0 to choose one.")
        for capability in self.capabilities:
            check_capability(target, capability, scheme.name)
        self._check_rules()

    def _check_rules(self) -> None:
        for rule in self.rules:
            try:
                ruled = self._ruled(rule)
            except InputError as error:
                raise InputError(f'rule for "{rule.matrices}": {error}') from None
            if SCALES_INPUTS in (self.method, ruled.method) and (
                ruled.method != self.method or not scheme_named(ruled.weights).is_quantized
            ):
                raise InputError(
                    f'rule for "{rule.matrices}": method {SCALES_INPUTS} scales inputs that matrices share, so it is for all '
                    f"of them or for none. Use it without rules for {ruled.weights} or another method."
                )

    def of(self, weight: str) -> Recipe:
        """The recipe for one matrix, by its parameter's name: without rules."""
        ruled = dataclasses.replace(self, rules=())
        for rule in self.rules:
            if rule.matches(weight):
                ruled = ruled._ruled(rule)
        return ruled

    def _ruled(self, rule: Rule) -> Recipe:
        changes = rule.changes()
        if "weights" in changes and not scheme_named(changes["weights"]).takes_methods:
            changes["method"] = "rtn"  # which is no method: nothing is rounded, or number by number
        if "weights" in changes and not scheme_named(changes["weights"]).takes_zero_points:
            changes = {"asymmetric": False} | changes
        # Where corral has no kernels for a matrix, those of ONNX Runtime compute it, or the lowering refuses.
        able = target_named(self.target).kernels[self.kernels]
        kernels = self.kernels if changes.get("weights", self.weights) in able else "stock"
        # The KV cache is no matrix's concern.
        return dataclasses.replace(self, rules=(), kv="float", **{"kernels": kernels, **changes})

    @property
    def schemes(self) -> tuple[str, ...]:
        """The names of every scheme that some matrix may be stored in."""
        return tuple(dict.fromkeys((self.weights, *(rule.weights for rule in self.rules if rule.weights))))

    @property
    def methods(self) -> frozenset[str]:
        """Every method that some matrix may be quantized by."""
        return frozenset({self.method, *(rule.method for rule in self.rules if rule.method)})

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities that `gpu` names, each once, lowest first."""
        named = {capability_of(gpu.strip()) for gpu in self.gpu.split(",") if gpu.strip()}
        return tuple(sorted(named, key=float))

    @property
    def rounds_activations(self) -> bool:
        """Whether what matrices are multiplied with is quantized, too, by scales that a calibration text shows."""
        return any(scheme_named(name).is_float for name in self.schemes)

    @property
    def kv_dtype(self) -> str:
        """How the KV cache is stored: a float type, or one of `kv_layout.KV_GROUPS`."""
        return target_named(self.target).kv_dtype if self.kv == "float" else self.kv

    @property
    def lowering(self) -> str:
        """Which row of `graphs/pipeline.py` brings a graph to the target."""
        return self.target if self.kernels == "stock" else f"{self.target}-{self.kernels}"

    @property
    def requires(self) -> dict[str, str]:
        """What a bundle of this recipe needs to run: package (or library of custom operators) -> lowest version."""
        library = {cpu_ops.LIBRARY: str(cpu_ops.VERSION)} if self.kernels == "corral" else {}
        return dict(target_named(self.target).requires) | library

    def to_json(self) -> dict[str, Any]:
        """The keys that the target knows: those of engines only where it has any."""
        data = dataclasses.asdict(self)
        data["rules"] = [{"matrices": rule.matrices, **rule.changes()} for rule in self.rules]
        return data if target_named(self.target).engine else {k: v for k, v in data.items() if k not in ENGINE_KEYS}

    def to_toml(self) -> str:
        data = self.to_json()
        rules = data.pop("rules")
        lines = [f"{key} = {_toml(value)}\n" for key, value in data.items()]
        return "".join(lines) + (rules_toml(rules) if rules else "")

    @staticmethod
    def from_json(data: dict[str, Any], *, where: str = "recipe") -> Recipe:
        """Make a recipe of a mapping. Raises InputError for unknown keys and values of the wrong type."""
        fields = {field.name: type(field.default) for field in dataclasses.fields(Recipe)}
        fields["rules"] = list
        for key, value in data.items():
            if key not in fields:
                raise InputError(f'{where}: key "{key}" is not known; expected {", ".join(fields)}.')
            if type(value) is not fields[key]:
                raise InputError(f"{where}: {key} is {value!r}, expected a {fields[key].__name__}.")
        rules = (Rule.from_json(rule, f"{where}: rule {i + 1}") for i, rule in enumerate(data.get("rules", ())))
        return Recipe(**{**data, "rules": tuple(rules)})


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a recipe file; `overrides` that are not None win. Raises InputError naming the file."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"recipe {path} is not readable TOML: {error}.") from None
    return Recipe.from_json(data | {k: v for k, v in overrides.items() if v is not None}, where=f"recipe {path}")


def rules_toml(rules: Sequence[Mapping[str, Any]], remarks: Sequence[str] = ()) -> str:
    """Rules as a TOML array, one a line, each with its remark where there are any."""
    tables = [", ".join(f"{key} = {_toml(value)}" for key, value in rule.items()) for rule in rules]
    lines = [f"  {{ {table} }}," for table in tables]
    width = max(map(len, lines), default=0)
    remarked = [f"{line:{width}}  # {remark}" for line, remark in zip(lines, remarks, strict=False)]
    return "\n".join(["rules = [", *remarked, *lines[len(remarked) :], "]", ""])


def _toml(value: str | int | bool) -> str:
    """Of strings without control characters, whole numbers and booleans TOML has JSON's spelling."""
    return json.dumps(value)
