"""lm-eval's tasks on a bundle: probabilities against the PyTorch model, text against `LLM`, a local task from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
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

from corral.validate.lm_eval_model import BundleLM
from corral.validate.tasks import Tasks, run_tasks

TinyCheckpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str, str], Path]
BOS = 256  # of the tiny tokenizer, whose other ids are bytes
QUESTIONS = ("def f(", "import ", "x = ", "for i in ", "while ", "return", "class A", "# ")
CHOICES = ("a", "b", "cd", "(self)")


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def llm(tiny_bundle: TinyBundle) -> LLM:
    return LLM(tiny_bundle("scout", "cpu", "fp32"), threads=1)


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
    for (question, choice), answer in zip(pairs, found, strict=True):
        # A space at the end of a question belongs to the answer.
        count = len(choice) + len(question) - len(question.rstrip())
        want = log_probability([llm.config.bos_token_id or 0, *(question + choice).encode()], count)
        assert answer == (pytest.approx(want[0], abs=1e-4), want[1]), (question, choice)


def test_the_likeliest_answer_is_told(llm: LLM) -> None:
    [text] = llm.generate(["def f("], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    token = text.token_ids[0]
    [(_, greedy)] = BundleLM(llm)._loglikelihood_tokens([(("", ""), [BOS, *b"def f("], [token])])
    [(_, other)] = BundleLM(llm)._loglikelihood_tokens([(("", ""), [BOS, *b"def f("], [(token + 1) % 256])])
    assert greedy and not other


def test_what_was_read_is_not_read_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    score = LLM.score_pieces
    monkeypatch.setattr(LLM, "score_pieces", lambda self, ids: reads.append(len(ids)) or score(self, ids))
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
    ids = [small.config.bos_token_id or 0, *text.encode()]
    want = sum(
        log_probability(ids[start:stop], count)[0] for start, stop, count in ((0, 25, 24), (24, 49, 24), (36, 61, 12))
    )
    assert BundleLM(small).loglikelihood_rolling([asked(text)]) == [pytest.approx(want, abs=1e-4)]


def test_text_ends_where_the_task_says(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0)
    [whole] = [completion.text for completion in llm.generate(["def f("], params)]
    assert len(whole) > 4
    options = {"until": [whole[3]], "max_gen_toks": 12}
    long = "x" * (2 * llm.max_context if llm.max_context < 10_000 else 0)
    model = BundleLM(llm)
    assert (
        model.generate_until([asked("def f(", options), asked(long + "def f(", {"max_gen_toks": 12})])[0]
        == (whole[: whole.index(whole[3])])
    )
    assert model.generate_until([asked("def f(", {"max_gen_toks": 12})]) == [whole]


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
    bos = llm.config.bos_token_id or 0
    answers = []
    for i, question in enumerate(QUESTIONS):
        sums = [
            log_probability([bos, *(question + choice).encode()], len(choice) + question.endswith(" "))[0]
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


def test_the_herds_tasks_are_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own list, and without fetching anything; a name that is not among them is told with those near it."""
    monkeypatch.setattr(Tasks, "_load", lambda self, name: [name])
    assert Tasks(["llama4", "mmlu"]).names == [
        "mmlu_pro",
        "gpqa_diamond_cot_zeroshot",
        "hendrycks_math500",
        "mmmlu",
        "mmlu",
        "gsm8k",
    ]
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
