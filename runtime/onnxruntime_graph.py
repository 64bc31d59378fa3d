"""One graph of a bundle on ONNX Runtime: past and present caches are one memory, written in place.

Sharing works for both ways a graph writes its cache: TensorScatter skips its copy where input and output are the same
memory, and GroupQueryAttention expects it. Nothing else in a graph reads `past_*` (spec.graph_io).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corral.kernels import find_library
from corral.runtime.session import CacheView, Float32, Step
from corral.runtime.stage_io import stage_io
from corral.spec import graph_io
from corral.spec.bundle import Bundle
from corral.spec.cpu_ops import LIBRARY
from corral.spec.errors import CorralError, EnvironmentProblem, InputError
from corral.spec.manifest import GraphRecord

# The last one takes what those before it have no kernel for.
PROVIDERS = {"cpu": ("CPUExecutionProvider",), "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider")}


@dataclass(frozen=True)
class Tap:
    """A graph to open in place of the file's: the same with more `values` among its outputs, for who looks inside."""

    model: bytes
    values: tuple[str, ...]


class OnnxRuntimeGraph:
    """Runs one range of layers. `mapped` leaves the weights in the file as they are: little memory, and slow kernels."""

    reads_bound_memory = True  # at each run, so that arrays may stay bound

    def __init__(
        self, bundle: Bundle, record: GraphRecord, *, provider: str, threads: int, mapped: bool, tap: Tap | None = None
    ) -> None:
        model = bundle.manifest.model
        self._io = stage_io(model, record)
        self._vocab_size = model.vocab_size
        # ONNX Runtime looks for external data beside the real file, and refuses symbolic links to it.
        self._where = str(bundle.path(record.path).resolve())
        self._tap = tap
        self.tapped: Mapping[str, np.ndarray[Any, Any]] = {}  # what the tap's values were in the last run
        self._ort = import_onnxruntime()
        self._session = self._open(provider, threads, mapped, kernels=LIBRARY in bundle.manifest.requires)
        inputs = [value.name for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs() if not tap or value.name not in tap.values]
        self._io.check(self._where, inputs, outputs)
        self._binding: Any = None
        self._bound: CacheView[Any] | None = None
        self._shapes: tuple[tuple[int, ...], ...] = ()  # of the arrays that are bound
        self._inputs: dict[str, np.ndarray[Any, Any]] = {}
        self._output: Float32 = np.empty(0, np.float32)

    def run(self, step: Step, hidden_BSH: Float32) -> Float32:
        """Put `hidden_BSH`, rows of the embedding table or what the stage before gave, through these layers.

        Returns the next stage's [B, S, H], or the last one's logits [B, R, V]. What is returned is overwritten by the next
        run, except logits of more than one row a sequence, which are the caller's.
        """
        inputs: dict[str, np.ndarray[Any, Any]] = {
            self._io.source: hidden_BSH,
            graph_io.POSITIONS: step.positions_BS,
            **{graph_io.past_length(kv_class): step.past_length_B[kv_class] for kv_class in self._io.kv_classes},
        }
        if self._io.last:
            inputs[graph_io.LOGIT_ROWS] = step.logit_rows_BR
        try:
            if step.caches is not self._bound:
                self._bind_caches(step.caches, len(step.positions_BS))
            shapes = (hidden_BSH.shape, step.logit_rows_BR.shape)
            if shapes != self._shapes:
                self._bind_arrays(inputs, shapes)
            for name, array in inputs.items():
                self._inputs[name][...] = array
            if self._tap:
                for name in self._tap.values:
                    self._binding.bind_output(name)
            self._session.run_with_iobinding(self._binding)
            if self._tap:
                bound = self._binding.get_outputs()[-len(self._tap.values) :]  # in the order in which they were bound
                self.tapped = {name: v.numpy() for name, v in zip(self._tap.values, bound, strict=True)}
        except Exception as error:
            raise self._run_error(error) from None
        if step.logit_rows_BR.shape[1] > 1 or not self.reads_bound_memory:
            self._shapes = ()
        return self._output

    def release(self) -> None:
        """Let go of the caches of the last step, so that their memory can be freed."""
        self._binding = self._bound = None
        self._shapes, self._inputs, self._output = (), {}, np.empty(0, np.float32)

    def _bind_caches(self, caches: CacheView[Any], batch: int) -> None:
        self._binding, self._bound, self._shapes = self._session.io_binding(), caches, ()
        for i in self._io.layers:
            self._bind_cache(i, graph_io.past_key(i), graph_io.present_key(i), caches.keys[i], batch)
            self._bind_cache(i, graph_io.past_value(i), graph_io.present_value(i), caches.values[i], batch)

    def _bind_cache(self, layer: int, past: str, present: str, rows: Any, batch: int) -> None:
        """Bind one of a layer's caches, of `batch` sequences, as input and output."""
        value = self._ort_value(rows)
        self._binding.bind_ortvalue_input(past, value)
        self._binding.bind_ortvalue_output(present, value)

    def _bind_arrays(self, inputs: Mapping[str, np.ndarray[Any, Any]], shapes: tuple[tuple[int, ...], ...]) -> None:
        """Bind arrays like `inputs`, and one for the result, that stay bound: a decode step then binds nothing."""
        (batch, tokens, hidden), rows = shapes
        self._output = np.empty((*rows, self._vocab_size) if self._io.last else (batch, tokens, hidden), np.float32)
        self._inputs = {name: np.empty_like(array, order="C") for name, array in inputs.items()}
        for name, array in self._inputs.items():
            self._binding.bind_ortvalue_input(name, self._ort_value(array))
        self._binding.bind_ortvalue_output(self._io.result, self._ort_value(self._output))
        self._shapes = shapes

    def _ort_value(self, array: np.ndarray[Any, Any]) -> Any:
        # ONNX Runtime copies what is not contiguous, and then nothing would be written to our memory.
        assert array.flags.c_contiguous, "an array that is bound must be contiguous"
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _open(self, provider: str, threads: int, mapped: bool, *, kernels: bool) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        # Otherwise one stage's threads go on spinning while the next one's work.
        one_stage = self._io.first and self._io.last
        options.add_session_config_entry("session.force_spinning_stop", "0" if one_stage else "1")
        if kernels:
            self._register(options)
        # Where a graph dequantizes weights itself (`portable`), its products stay in float32: by default ONNX Runtime
        # would round the activations to int8. Where they are to be rounded, the graph's own operators say so.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False  # which would keep the largest scratch of each stage
        if self._tap:
            folder = str(Path(self._where).parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            model = self._tap.model if self._tap else self._where
            return self._ort.InferenceSession(model, options, providers=list(PROVIDERS[provider]))
        except Exception as error:
            if _out_of_memory(error):
                raise EnvironmentProblem(f"{self._where} does not fit into memory: {_first_line(error)}") from None
            raise InputError(
                f"ONNX Runtime {self._ort.__version__} cannot open {self._where}: {_first_line(error)} "
                "Compile the checkpoint again with this version of corral."
            ) from None

    def _register(self, options: Any) -> None:
        """Let graphs use corral's own operators."""
        library = find_library()
        try:
            options.register_custom_ops_library(str(library.path))
        except Exception as error:
            raise EnvironmentProblem(
                f"ONNX Runtime {self._ort.__version__} cannot use corral's CPU kernels ({library.path}): "
                f"{_first_line(error)} Compile the checkpoint with `--kernels stock`."
            ) from None

    def _run_error(self, error: Exception) -> CorralError:
        if _out_of_memory(error):
            return EnvironmentProblem(
                f"out of memory while running {self._where}: {_first_line(error)} "
                "Use fewer prompts at a time, shorter ones, or a more compressed bundle."
            )
        return CorralError(
            f"ONNX Runtime {self._ort.__version__} failed to run {self._where}: {_first_line(error)} "
            "Open the bundle with verify=True to see whether it is damaged; if it is not, please report this."
        )


def import_onnxruntime() -> Any:
    """The module, at its first use. Raises EnvironmentProblem where it is broken."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentProblem(
            f"onnxruntime is installed but does not import: {error}. "
            "Reinstall it: `pip install --force-reinstall onnxruntime`."
        ) from None
    return onnxruntime


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "bad_alloc" in text or "failed to allocate memory" in text


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if line.endswith((".", "!")) else line + "."
