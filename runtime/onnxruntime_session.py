"""A Session over one ONNX graph on ONNX Runtime: past and present caches are one memory, written in place.

Sharing works for both ways a graph writes its cache: TensorScatter skips its copy where input and output are the same
memory, and GroupQueryAttention expects it. Nothing else in a graph reads `past_*` (spec.graph_io).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from corral.runtime.requirements import check_requirements
from corral.runtime.session import CacheView, Float32, Step
from corral.spec import graph_io
from corral.spec.bundle import Bundle
from corral.spec.errors import CorralError, EnvironmentProblem, InputError
from corral.spec.machine import usable_cores

PROVIDERS = {"cpu": "CPUExecutionProvider"}


class OnnxRuntimeSession:
    """Runs a bundle's graph with one execution provider. Not for several threads at a time."""

    def __init__(self, bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> None:
        check_requirements(bundle.manifest.requires)
        if provider not in PROVIDERS:
            raise InputError(f"provider is {provider!r}, expected one of {', '.join(PROVIDERS)}.")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}, expected a whole number of at least 1.")
        self._where = str(_only_graph(bundle))
        self._num_layers = bundle.manifest.model.num_layers
        self._vocab_size = bundle.manifest.model.vocab_size
        self._ort = _import_onnxruntime()
        self._session = self._open(PROVIDERS[provider], threads or usable_cores())
        self._check_names(bundle)
        self._binding: Any = None
        self._bound: CacheView | None = None

    def run(self, step: Step) -> Float32:
        if step.caches is not self._bound:
            self._bind_caches(step.caches)
        batch, rows = step.logit_rows_BR.shape
        logits = np.empty((batch, rows, self._vocab_size), dtype=np.float32)
        # OrtValues point at these arrays, so they must live until the run is over.
        inputs: dict[str, np.ndarray[Any, Any]] = {
            graph_io.EMBEDDINGS: step.embeddings_BSH,
            graph_io.POSITIONS: step.positions_BS,
            graph_io.LOGIT_ROWS: step.logit_rows_BR,
            **{graph_io.past_length(kv_class): length for kv_class, length in step.past_length_B.items()},
        }
        try:
            for name, array in inputs.items():
                self._binding.bind_ortvalue_input(name, self._ort_value(array))
            self._binding.bind_ortvalue_output(graph_io.LOGITS, self._ort_value(logits))
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise self._run_error(error) from None
        return logits

    def release(self) -> None:
        self._binding = self._bound = None

    def _bind_caches(self, caches: CacheView) -> None:
        self._binding, self._bound = self._session.io_binding(), caches
        for layer, (key, value) in enumerate(zip(caches.keys, caches.values, strict=True)):
            key, value = self._ort_value(key), self._ort_value(value)
            self._binding.bind_ortvalue_input(graph_io.past_key(layer), key)
            self._binding.bind_ortvalue_output(graph_io.present_key(layer), key)
            self._binding.bind_ortvalue_input(graph_io.past_value(layer), value)
            self._binding.bind_ortvalue_output(graph_io.present_value(layer), value)

    def _ort_value(self, array: np.ndarray[Any, Any]) -> Any:
        # ONNX Runtime copies what is not contiguous, and then nothing would be written to our memory.
        assert array.flags.c_contiguous, "an array that is bound must be contiguous"
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _open(self, provider: str, threads: int) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        try:
            return self._ort.InferenceSession(self._where, options, providers=[provider])
        except Exception as error:
            if _out_of_memory(error):
                raise EnvironmentProblem(f"{self._where} does not fit into memory: {_first_line(error)}") from None
            raise InputError(
                f"ONNX Runtime {self._ort.__version__} cannot open {self._where}: {_first_line(error)} "
                "Compile the checkpoint again with this version of corral."
            ) from None

    def _check_names(self, bundle: Bundle) -> None:
        layers = range(self._num_layers)
        inputs = {graph_io.EMBEDDINGS, graph_io.POSITIONS, graph_io.LOGIT_ROWS}
        inputs |= {graph_io.past_length(layout.kv_class) for layout in bundle.manifest.kv}
        inputs |= {name(i) for i in layers for name in (graph_io.past_key, graph_io.past_value)}
        outputs = {graph_io.LOGITS}
        outputs |= {name(i) for i in layers for name in (graph_io.present_key, graph_io.present_value)}
        for kind, expected, found in (
            ("inputs", inputs, {value.name for value in self._session.get_inputs()}),
            ("outputs", outputs, {value.name for value in self._session.get_outputs()}),
        ):
            if expected != found:
                raise InputError(
                    f"{self._where} has other {kind} than its manifest implies: lacks {sorted(expected - found)}, "
                    f"has also {sorted(found - expected)}. Compile the checkpoint again."
                )

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


def _only_graph(bundle: Bundle) -> Any:
    graphs, layers = bundle.manifest.graphs, bundle.manifest.model.num_layers
    if len(graphs) != 1 or (graphs[0].first_layer, graphs[0].end_layer) != (0, layers):
        ranges = ", ".join(f"{graph.first_layer}-{graph.end_layer}" for graph in graphs) or "none"
        raise InputError(
            f"{bundle.directory} has graphs for layers {ranges}; this version runs one graph that holds all {layers}. "
            "Compile the whole model into one stage."
        )
    # ONNX Runtime looks for external data beside the real file, and refuses symbolic links to it.
    return bundle.path(graphs[0].path).resolve()


def _import_onnxruntime() -> Any:
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
