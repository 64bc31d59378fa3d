"""A bundle as a model of lm-eval: its tasks ask for probabilities of given text, and for new text; `LLM` answers.

lm-eval is imported with this file, which takes seconds; `tasks.py` imports it where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from corral.runtime import LLM, SamplingParams
from corral.spec.errors import InputError
from corral.validate.divergence import log_softmax

TOGETHER = 64  # texts that are handed to the engine at once, which batches them as it can
Asked = tuple[tuple[str, str], list[int], list[int]]  # texts of context and continuation, and their token ids


class BundleLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's interface over an `LLM`. What is longer than its context loses its beginning.

    `heard` is told how many requests are done, and of how many. Raises InputError where the bundle has no tokenizer.
    """

    backend = "causal"

    def __init__(self, llm: LLM, heard: Callable[[int, int], None] = lambda done, total: None) -> None:
        super().__init__()
        if llm.tokenizer is None:
            raise InputError(
                f"{llm.bundle.directory} has no tokenizer, which tasks need: they are texts. Compile a checkpoint "
                "directory that holds a tokenizer.json."
            )
        self._llm, self._encoder, self._heard = llm, llm.tokenizer, heard

    @property
    def tokenizer_name(self) -> str:
        return self._llm.bundle.directory.name

    @property
    def eot_token_id(self) -> int:
        return self._llm.config.eos_token_ids[0] if self._llm.config.eos_token_ids else 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos = self._llm.config.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids; by default with one beginning-of-text in front, where the model has that token."""
        ids, bos = self._encoder.encode(string, add_special_tokens=False), self._llm.config.bos_token_id
        if bos is None or ids[:1] == [bos] or add_special_tokens is False:
            return ids
        return [bos, *ids]

    def apply_chat_template(self, chat_history: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the bundle's chat template makes of it."""
        ids = self._encoder.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        return self._encoder.decode(ids, skip_special_tokens=False)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(context, continuation) -> natural log-probability of the continuation, and whether it is the likeliest."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Natural log-probability of each whole text, behind a beginning-of-text."""
        found = []
        for done, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._llm.max_context,
                context_len=1,
            )
            found.append(sum(self._answer(*make_disjoint_window(window))[0] for window in windows))
            self._heard(done + 1, len(requests))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """(context, options) -> the text that follows, up to a stop string, an end token or the most tokens."""
        texts: list[str] = []
        for start in range(0, len(requests), TOGETHER):
            some = [request.args for request in requests[start : start + TOGETHER]]
            params = [_sampling(options) for _, options in some]
            prompts = [
                self._ending(self.tok_encode(context), self._llm.max_context - one.max_tokens)
                for (context, _), one in zip(some, params, strict=True)
            ]
            texts += [completion.text for completion in self._llm.generate(prompts, params)]
            self._heard(len(texts), len(requests))
        return texts

    def _loglikelihood_tokens(self, requests: Sequence[Asked], **unused: Any) -> list[tuple[float, bool]]:
        """Requests that differ in their last token only, as the letters of answers do, are read once."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            alike.setdefault((len(continuation), *context, *continuation[:-1]), []).append(i)
        found: dict[int, tuple[float, bool]] = {}
        for some in alike.values():
            last = [requests[i][2][-1] for i in some]
            answers = self._answers(requests[some[0]][1], requests[some[0]][2][:-1], last)
            found |= dict(zip(some, answers, strict=True))
            self._heard(len(found), len(requests))
        return [found[i] for i in range(len(requests))]

    def _answer(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        [answer] = self._answers(context, continuation[:-1], continuation[-1:])
        return answer

    def _answers(self, context: Sequence[int], begun: Sequence[int], last: Sequence[int]) -> list[tuple[float, bool]]:
        """Of the continuation `begun` + one of `last` behind `context`, for each of `last`."""
        ids = self._ending([*context, *begun], self._llm.max_context)
        count = min(len(begun) + 1, len(ids))  # predictions that are asked for: rows at the end
        log_p_nV = log_softmax(np.concatenate(list(_last_rows(self._llm.score_pieces(ids), len(ids), count))))
        likeliest_n, came = log_p_nV.argmax(-1), list(begun[len(begun) - count + 1 :])
        total = float(log_p_nV[np.arange(count - 1), came].sum())
        greedy = likeliest_n[:-1].tolist() == came
        return [(total + float(log_p_nV[-1, token]), greedy and int(likeliest_n[-1]) == token) for token in last]

    def _ending(self, ids: list[int], most: int) -> list[int]:
        """The last `most` ids: at least one is always read."""
        return ids[-max(most, 1) :]


def _last_rows(pieces: Iterable[Any], rows: int, count: int) -> Iterator[Any]:
    """The last `count` of `rows` rows that come in pieces: all others are let go at once."""
    start = 0
    for piece in pieces:
        yield piece[max(rows - count - start, 0) :]
        start += len(piece)


def _sampling(options: dict[str, Any]) -> SamplingParams:
    """lm-eval's options of a generation; what it leaves open is greedy."""
    wanted = normalize_gen_kwargs(options)
    return SamplingParams(
        max_tokens=wanted["max_gen_toks"],
        temperature=wanted.get("temperature", 0.0) if wanted["do_sample"] else 0.0,
        top_p=wanted.get("top_p", 1.0),
        top_k=wanted.get("top_k", 0),
        stop=tuple(stop for stop in wanted["until"] if stop),
        seed=0,
    )
