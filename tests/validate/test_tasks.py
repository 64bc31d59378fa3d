"""lm-eval's tasks on a bundle: probabilities against the PyTorch model, text against `LLM`, a local task from end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from corral.model.checkpoint import load_reference, open_checkpoint
from corral.runtime import LLM, SamplingParams
from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.model_config import parse_config
from corral.spec.presets import PRESETS
from corral.validate.published import BENCHMARKS, lacking, published_score

pytest.importorskip("lm_eval", reason="needs the extra tasks")

import lm_eval.tasks

from corral.validate.lm_eval_model import BundleLM
from corral.validate.tasks import Tasks, run_tasks

TinyCheckpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]
QUESTIONS = ("def f(", "import ", "x = ", "for i in ", "while ", "return", "class A", "# ")
CHOICES = ("a", "b", "cd", "(self)")


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def llm(tiny_bundle: TinyBundle) -> LLM:
    return LLM(tiny_bundle("scout", "cpu", "fp32"), threads=1)


def ids_of(llm: LLM, text: str) -> list[int]:
    """A beginning-of-text and a token a byte: the tiny tokenizer merges nothing."""
    assert llm.tokenizer is not None and llm.config.bos_token_id is not None
    return [llm.config.bos_token_id, *llm.tokenizer.encode(text, add_special_tokens=False)]


@pytest.fixture(scope="module")
def log_probability(tiny_checkpoint: TinyCheckpoint) -> Callable[[list[int], int], tuple[float, bool]]:
    """Of the last `count` ids by the PyTorch model, behind those before them: their sum, and whether each is the likeliest."""
    model = load_reference(open_checkpoint(tiny_checkpoint("scout")))

    def measure(ids: list[int], count: int) -> tuple[float, bool]:
        with torch.inference_mode():
            log_p = F.log_softmax(model.logits(torch.tensor([ids[:-1]]))[0].double(), dim=-1)[-count:]
        came = torch.tensor(ids[-count:])
        return log_p.gather(1, came[:, None]).sum().item(), bool((log_p.argmax(-1) == came).all())

    return measure


def test_probabilities_are_the_models(
    llm: LLM, log_probability: Callable[[list[int], int], tuple[float, bool]]
) -> None:
    """In any order, for answers of one token and of several, and where nothing or a space stands before them."""
    pairs = [(question, choice) for choice in CHOICES for question in (*QUESTIONS[:3], "")]
    found = BundleLM(llm).loglikelihood([asked(*pair) for pair in pairs])
    for (question, choice), (answer, likeliest) in zip(pairs, found, strict=True):
        # A space at the end of a question belongs to the answer.
        count = len(choice) + len(question) - len(question.rstrip())
        want, is_likeliest = log_probability(ids_of(llm, question + choice), count)
        assert answer == pytest.approx(want, abs=1e-4), (question, choice)
        assert likeliest == is_likeliest, (question, choice)


def test_the_likeliest_answer_is_told(llm: LLM) -> None:
    ids = ids_of(llm, "def f(")
    [text] = llm.generate([ids], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    first, second = text.token_ids
    answers = [[first], [first, second], [first + 1, second], [first, second + 1]]
    found = BundleLM(llm)._loglikelihood_tokens([(("", ""), ids, answer) for answer in answers])
    assert [greedy for _, greedy in found] == [True, True, False, False]


def test_what_was_read_is_not_read_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    score = llm.score_pieces

    def read(ids: Sequence[int]) -> Iterator[Any]:
        reads.append(len(ids))
        return score(ids)

    monkeypatch.setattr(llm, "score_pieces", read)
    told: list[tuple[int, int]] = []
    BundleLM(llm, lambda *how: told.append(how)).loglikelihood([asked("Answer:", choice) for choice in "ABCD"])
    assert reads == [len("Answer:") + 1]
    assert told == [(4, 4)]


def test_a_long_text_is_scored_window_by_window(
    tiny_bundle: TinyBundle, log_probability: Callable[[list[int], int], tuple[float, bool]]
) -> None:
    """Each token once, the last window with as much before it as the context holds."""
    small = LLM(tiny_bundle("scout", "cpu", "fp32"), threads=1, max_context=24)
    text = "".join(chr(97 + i % 23) for i in range(60))
    ids = ids_of(small, text)
    want = sum(
        log_probability(ids[start:stop], count)[0] for start, stop, count in ((0, 25, 24), (24, 49, 24), (36, 61, 12))
    )
    assert BundleLM(small).loglikelihood_rolling([asked(text)]) == [pytest.approx(want, abs=1e-4)]


def test_text_ends_where_the_task_says(llm: LLM) -> None:
    params = SamplingParams(max_tokens=32, temperature=0.0)
    [whole] = [completion.text for completion in llm.generate([ids_of(llm, "def f(")], params)]
    stop = next(letter for letter in whole[1:] if letter.isascii())
    model, options = BundleLM(llm), {"until": [], "max_gen_toks": 32}
    assert model.generate_until([asked("def f(", options), asked("def f(", options | {"until": stop})]) == [
        whole,
        whole[: whole.index(stop)],
    ]
    small = LLM(llm.bundle, threads=1, max_context=40)  # and what does not fit before the answer is cut off
    cut = small.generate([ids_of(llm, "x" * 99)[-8:]], params)[0].text
    assert BundleLM(small).generate_until([asked("x" * 99, options)]) == [cut]


def test_a_conversation_is_the_chat_templates(llm: LLM) -> None:
    assert llm.tokenizer is not None
    model, messages = BundleLM(llm), [{"role": "user", "content": "hi"}]
    text = model.apply_chat_template(messages)
    assert model.tok_encode(text) == llm.tokenizer.apply_chat_template(messages)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], Path]:
    """`task(answers)` -> a YAML file of a multiple-choice task about `QUESTIONS`. No network, and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(answers: list[int]) -> Path:
        rows = [{"question": q, "choices": CHOICES, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
        (tmp_path / "questions.json").write_text(json.dumps(rows))
        (tmp_path / "local.yaml").write_text(
            "task: local\ndataset_path: json\ntest_split: train\noutput_type: multiple_choice\n"
            f"dataset_kwargs: {{data_files: {tmp_path / 'questions.json'}}}\n"
            "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\ndoc_to_choice: '{{choices}}'\ntarget_delimiter: ''\n"
            "metric_list: [{metric: acc}]\n"
        )
        return tmp_path / "local.yaml"

    return write


def test_a_local_task_from_end_to_end(
    task: Callable[[list[int]], Path],
    log_probability: Callable[[list[int], int], tuple[float, bool]],
    tiny_checkpoint: TinyCheckpoint,
    tiny_bundle: TinyBundle,
    llm: LLM,
) -> None:
    """Of eight questions, five are given the answer that the PyTorch model finds likeliest: five are right."""
    answers = []
    for i, question in enumerate(QUESTIONS):
        sums = [
            log_probability(ids_of(llm, question + choice), len(choice) + question.endswith(" "))[0]
            for choice in CHOICES
        ]
        likeliest = sums.index(max(sums))
        answers.append(likeliest if i < 5 else (likeliest + 1) % len(CHOICES))
    tasks = Tasks([str(task(answers))])
    how: dict[str, Any] = {"limit": None, "chat": False, "provider": "cpu", "threads": 1}
    [score] = run_tasks(tasks, [tiny_checkpoint("scout"), tiny_bundle("scout", "cpu", "fp32")], **how)
    assert (score.task, score.metric, score.documents, score.published) == ("local", "acc,none", 8, None)
    assert score.value == 5 / 8 and score.stderr == pytest.approx((5 / 8 * 3 / 8 / 7) ** 0.5)
    [fewer] = run_tasks(tasks, [tiny_bundle("scout", "cpu", "fp32")], **{**how, "limit": 5})
    assert (fewer.value, fewer.documents) == (1.0, 5)


def test_a_task_that_cannot_be_loaded_is_told(task: Callable[[list[int]], Path]) -> None:
    path = task([0] * len(QUESTIONS))
    path.write_text(path.read_text().replace("questions.json", "absent.json"))
    with pytest.raises(EnvironmentProblem, match=r"lm-eval cannot load the task .*local.yaml: FileNotFoundError"):
        Tasks([str(path)])


def test_the_herds_tasks_are_lm_evals() -> None:
    """By its files: listing them all takes it a while."""
    folders = ("mmlu_pro", "gpqa", "hendrycks_math", "openai-mmmlu/default", "mmlu/default", "gsm8k")
    files = [path for folder in folders for path in (Path(lm_eval.tasks.__file__).parent / folder).rglob("*.yaml")]
    names = set(re.findall(r"^(?:task|group): (\S+)$", "\n".join(path.read_text() for path in files), re.M))
    herd = {benchmark.task for benchmark in BENCHMARKS if benchmark.task}
    assert len(herd) == 6 and herd <= names


def test_names_are_looked_up_and_unknown_ones_told_with_those_near_them(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict.fromkeys(["gsm8k", "mmlu", *(benchmark.task for benchmark in BENCHMARKS)])
    manager = SimpleNamespace(task_index=known, all_tasks=list(known))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: manager)
    monkeypatch.setattr(Tasks, "_load", lambda self, name: [name])
    assert Tasks(["mmlu", "llama4"]).names[:3] == ["mmlu", "mmlu_pro", "gpqa_diamond_cot_zeroshot"]
    with pytest.raises(InputError, match=r'"gsm8l" is no task of lm-eval .* such as gsm8k'):
        Tasks(["gsm8l"])


def test_published_scores_are_of_the_model(tiny_config: Callable[[str], dict[str, Any]]) -> None:
    scout, tiny = PRESETS["scout"].model, parse_config(tiny_config("scout"))
    assert published_score(scout, "mmlu_pro", "exact_match,custom-extract") == 0.743
    assert published_score(PRESETS["maverick"].model, "gsm8k", "exact_match,flexible-extract") == 0.922
    assert published_score(scout, "gsm8k", "exact_match,strict-match") is None
    assert published_score(tiny, "mmlu_pro", "exact_match,custom-extract") is None
    assert all(0 < score < 1 for one in BENCHMARKS for score in one.scores.values())
    named = " ".join(lacking().values())
    assert all((one.title in named) != bool(one.task) for one in BENCHMARKS)
