"""One model in a process of its own, driven over pipes: corral.runtime or llama.cpp, timed by the same tests.

    python benchmarks/cpu_engines.py corral|llama.cpp MODEL THREADS [PEER]

reads tests as JSON lines and answers each with seconds, so that two engines never run at once and neither's threads
outlive its turn in the other's process. Both choose every token by its largest logit and get the same random ids.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from peak_memory import memory

if TYPE_CHECKING:
    from corral.runtime.completion import Piece

BATCH = 512  # tokens of a llama.cpp step, its own default


@dataclass(frozen=True)
class Test:
    """`sequences` prompts of `prompt` random tokens each, then `tokens` chosen ones for each.

    With `rounds`, a single prompt is read once, and each of so many runs writes on where the one before ended.
    """

    sequences: int
    prompt: int
    tokens: int
    rounds: int = 1


@dataclass(frozen=True)
class Result:
    """Seconds to the first token of all sequences, and after it."""

    prefill: float
    decode: float


class Engine(Protocol):
    """Something that can be timed."""

    vocab_size: int

    def run(self, prompts: list[list[int]], tokens: int) -> Result: ...

    def begin(self, prompt: list[int], most: int) -> None:
        """Read a prompt that at most `most` tokens will follow, and write the first of them."""

    def go_on(self, tokens: int) -> Result:
        """Write so many more, without prefill. Ends what was begun when another test runs."""


class Corral:
    """A bundle, through `LLM.generate`."""

    def __init__(self, model: str, threads: int) -> None:
        from corral.runtime import LLM

        self._llm = LLM(model, threads=threads, verify=False)
        self.vocab_size = self._llm.config.vocab_size
        self._stream: Iterator[Piece] = iter(())

    def run(self, prompts: list[list[int]], tokens: int) -> Result:
        from corral.runtime import SamplingParams

        self._stream = iter(())
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        timings = [done.timings for done in self._llm.generate(prompts, params)]
        first = max(timing.first_token for timing in timings)
        return Result(first, max(timing.total for timing in timings) - first)

    def begin(self, prompt: list[int], most: int) -> None:
        from corral.runtime import SamplingParams

        self._stream = self._llm.stream(prompt, SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True))
        next(self._stream)

    def go_on(self, tokens: int) -> Result:
        started, written = time.perf_counter(), 0
        while written < tokens:
            written += len(next(self._stream).token_ids)
        seconds = time.perf_counter() - started
        return Result(0.0, seconds * tokens / written)  # a piece of text may be more than one token


class LlamaCpp:
    """A GGUF file, through llama.cpp's C interface."""

    def __init__(self, model: str, threads: int, peer: str) -> None:
        from llama_cpp_peer import Gguf, Peer

        self._open = lambda context, sequences: Gguf(
            Peer(Path(peer)), Path(model), threads=threads, context=context, sequences=sequences
        )
        self._gguf, self._room = self._open(1024, 1), (1024, 1)
        self._chosen: list[int] = []  # the last token of each sequence, which was not read yet
        self._past = 0  # tokens that each has read
        self.vocab_size = self._gguf.vocab_size

    def run(self, prompts: list[list[int]], tokens: int) -> Result:
        self._make_room(len(prompts[0]) + tokens, len(prompts))
        started = time.perf_counter()
        self._read(prompts)
        first = time.perf_counter()
        self._write(tokens - 1)
        return Result(first - started, time.perf_counter() - first)

    def begin(self, prompt: list[int], most: int) -> None:
        self._make_room(len(prompt) + most, 1)
        self._read([prompt])

    def go_on(self, tokens: int) -> Result:
        started = time.perf_counter()
        self._write(tokens)
        return Result(0.0, time.perf_counter() - started)

    def _make_room(self, tokens: int, sequences: int) -> None:
        """A context is made once a test, and its time is not counted."""
        room = (max(1024, (tokens + 255) // 256 * 256), sequences)
        if room != self._room:
            self._gguf.close()
            self._gguf, self._room = self._open(*room), room
        self._gguf.clear()

    def _read(self, prompts: list[list[int]]) -> None:
        length, each = len(prompts[0]), max(1, BATCH // len(prompts))
        for start in range(0, length, each):
            self._gguf.step([prompt[start : start + each] for prompt in prompts], start)
        self._chosen, self._past = self._gguf.greedy(len(prompts)), length

    def _write(self, tokens: int) -> None:
        for _ in range(tokens):
            self._gguf.step([[token] for token in self._chosen], self._past)
            self._chosen, self._past = self._gguf.greedy(len(self._chosen)), self._past + 1


ENGINES: dict[str, Any] = {"corral": Corral, "llama.cpp": LlamaCpp}


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    return memory(os.getpid())["anonymous"]


class Worker:
    """The other end of the pipes: starts the process, sends tests, reads results."""

    def __init__(self, engine: str, model: Path, threads: int, peer: Path | None) -> None:
        more = [str(peer)] if engine == "llama.cpp" else []
        self._process = subprocess.Popen(
            [sys.executable, __file__, engine, str(model), str(threads), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},  # compiled modules are kept, as for users
        )
        self.opened = self._read()

    def run(self, test: Test) -> Result:
        return Result(**self._ask(test))

    def memory(self) -> dict[str, int]:
        """Anonymous memory before the model was opened, after it, and now, in bytes."""
        return {"imported": self.opened["imported"], "opened": self.opened["opened"], "now": self._ask(None)["now"]}

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()

    def _ask(self, test: Test | None) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(test and asdict(test)) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._process.args} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def answered(test: Test, last: Test | None, engine: Engine, rng: np.random.Generator) -> Result:
    """One run of a test; `last` was the one before it."""
    if test.rounds > 1 and test == last:
        return engine.go_on(test.tokens - 1)
    prompts = rng.integers(0, engine.vocab_size, (test.sequences, test.prompt)).tolist()
    if test.rounds == 1:
        return engine.run(prompts, test.tokens)
    engine.begin(prompts[0], 1 + test.rounds * (test.tokens - 1))
    return engine.go_on(test.tokens - 1)


def main() -> None:
    engine, model, threads, *peer = sys.argv[1:]
    out = sys.stdout
    sys.stdout = sys.stderr  # nothing that a library prints may come between the answers
    if engine == "corral":
        import onnxruntime  # noqa: F401  # what it takes by itself is not the model's
    imported = anonymous_bytes()
    opened: Engine = ENGINES[engine](model, int(threads), *peer)
    print(json.dumps({"imported": imported, "opened": anonymous_bytes()}), file=out, flush=True)
    rng, last = np.random.default_rng(0), None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked is None:
            answer = {"now": anonymous_bytes()}
        else:
            test = Test(**asked)
            answer, last = asdict(answered(test, last, opened, rng)), test
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
