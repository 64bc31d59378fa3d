"""llama.cpp, built from llama-cpp-python's source distribution, behind the few calls that the comparisons need.

Its own tools convert, calibrate and quantize; its own C interface computes and is timed. What is built stays in a
directory and is used again:

    python benchmarks/llama_cpp_peer.py /somewhere/with/1/GB
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = "0.3.36"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
PACKAGES = ("diskcache", "sentencepiece")  # what its Python sources import besides torch, transformers and numpy
# The fastest build for this machine, and nothing that reaches for a network.
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


@dataclass(frozen=True)
class Peer:
    """A built llama.cpp."""

    directory: Path

    @property
    def sources(self) -> Path:
        return self.directory / f"llama_cpp_python-{VERSION}"

    @property
    def binaries(self) -> Path:
        return self.directory / "build" / "bin"

    def convert(self, checkpoint: Path, out: Path, kind: str = "f32") -> Path:
        """Make a GGUF file by convert_hf_to_gguf.py, in a process of its own."""
        _run(sys.executable, __file__, "--convert", checkpoint, out, kind, self.directory)
        return out

    def imatrix(self, model: Path, text: Path, out: Path, *, threads: int, context: int = 128) -> Path:
        """Its importance matrix of a text."""
        _run(
            self.binaries / "llama-imatrix", "-m", model, "-f", text, "-o", out, "-c", context, "-t", threads, "-ngl", 0
        )
        return out

    def quantize(self, model: Path, out: Path, kind: str, imatrix: Path | None = None) -> Path:
        _run(self.binaries / "llama-quantize", *(("--imatrix", imatrix) if imatrix else ()), model, out, kind)
        return out

    def gguf(self) -> Any:
        """Its own package that reads and writes GGUF files."""
        path = str(self.sources / "vendor/llama.cpp/gguf-py")
        if path not in sys.path:
            sys.path.append(path)
        import gguf

        return gguf

    def bindings(self) -> Any:
        """llama-cpp-python's module of the C interface, over the library built here."""
        os.environ["LLAMA_CPP_LIB_PATH"] = str(self.binaries)
        for path in (self.directory / "python", self.sources):
            if str(path) not in sys.path:
                sys.path.append(str(path))
        from llama_cpp import llama_cpp

        return llama_cpp


class Gguf:
    """A GGUF model opened by llama.cpp: steps of tokens for some sequences, and their logits."""

    def __init__(self, peer: Peer, path: Path, *, threads: int, context: int, sequences: int = 1) -> None:
        self._llama = llama = peer.bindings()
        self._silent = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._silent, None)
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp cannot open {path}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context * sequences, sequences
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            sys.exit(f"llama.cpp cannot make a context of {context} tokens x {sequences} for {path}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(512, 0, 1)

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)

    def step(self, tokens: Sequence[Sequence[int]], past: int, *, every_logit: bool = False) -> float:
        """Seconds of a step of `tokens[sequence]`, each with `past` tokens behind it; logits of the last or of all."""
        batch, count = self._batch, 0
        for sequence, ids in enumerate(tokens):
            for i, token in enumerate(ids):
                batch.token[count], batch.pos[count] = int(token), past + i
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = every_logit or i == len(ids) - 1
                count += 1
        batch.n_tokens = count
        started = time.perf_counter()
        failed = self._llama.llama_decode(self._context, batch)
        self._llama.llama_synchronize(self._context)
        seconds = time.perf_counter() - started
        if failed:
            sys.exit(f"llama_decode gives {failed}")
        return seconds

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits [tokens, vocab] of at most 512 tokens from position 0 on."""
        self.clear()
        self.step([token_ids], 0, every_logit=True)
        size = len(token_ids) * self.vocab_size
        found = ctypes.cast(self._llama.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float * size)).contents
        return np.frombuffer(found, np.float32).reshape(len(token_ids), -1).copy()

    def greedy(self, sequences: int) -> list[int]:
        """The likeliest next token of each sequence of the last step."""
        return [int(token) for token in self._rows(sequences).argmax(-1)]

    def _rows(self, count: int) -> NDArray[np.float32]:
        logits = self._llama.llama_get_logits(self._context)
        numbers = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * (count * self.vocab_size))).contents
        return np.frombuffer(numbers, np.float32).reshape(count, self.vocab_size)

    def close(self) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)


def build(directory: Path) -> Peer:
    """Fetch, unpack and compile llama.cpp in `directory`, each step unless it is done already. Takes minutes."""
    peer = Peer(directory.resolve())
    peer.directory.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "-q")
    archive = peer.directory / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.exists():
        wanted = f"llama-cpp-python=={VERSION}"
        _run(*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", peer.directory, wanted)
    if not peer.sources.exists():
        with tarfile.open(archive) as packed:
            packed.extractall(peer.directory, filter="data")
    if not (peer.directory / "python").exists():
        _run(*pip, "install", "--no-deps", "--target", peer.directory / "python", *PACKAGES)
    if not all((peer.binaries / tool).exists() for tool in TOOLS):
        where = peer.directory / "build"
        _run("cmake", "-S", peer.sources / "vendor/llama.cpp", "-B", where, *CMAKE)
        _run("cmake", "--build", where, "--parallel", "--target", *TOOLS)
    return peer


def _convert(checkpoint: str, out: str, kind: str, directory: str) -> None:
    peer = Peer(Path(directory))
    tree = peer.sources / "vendor/llama.cpp"
    sys.path[:0] = [str(tree), str(tree / "gguf-py"), str(peer.directory / "python")]
    from conversion.base import TextModel

    # It knows tokenizers by the hash of what they make of a text; the demo's is its own, in Llama 4's form.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama4"
    script = str(tree / "convert_hf_to_gguf.py")
    sys.argv = [script, checkpoint, "--outfile", out, "--outtype", kind]
    runpy.run_path(script, run_name="__main__")


def _run(*command: Any) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")


if __name__ == "__main__":
    if "--convert" in sys.argv:
        _convert(*sys.argv[2:])
    else:
        arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        arguments.add_argument("directory", type=Path)
        print(build(arguments.parse_args().directory).binaries)
