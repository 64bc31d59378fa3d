"""What is published of the herd's accuracy, and which of lm-eval's tasks measure the like. Shares of right answers, 0 to 1.

Of MMLU Pro to MTOB: by the models' makers, of the Instruct models as they were released. Of MMLU and GSM8K: by others, of
the same models in bfloat16. Prompts and the reading of answers differ from lm-eval's, so that a difference of some points
between published and measured says nothing about a build: its difference from another build in the same task does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from corral.spec.model_config import ModelConfig
from corral.spec.presets import PRESETS

IMAGES = "they show images, and corral compiles the text decoder"
NO_TASK = "lm-eval has no task of them"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row of what is published: preset -> score, lm-eval's task, and the metrics of it that are like the published one.

    Without a task, `lacking` says why.
    """

    title: str
    scores: Mapping[str, float]
    task: str = ""
    metrics: tuple[str, ...] = ()
    lacking: str = ""


BENCHMARKS = (
    Benchmark(
        title="MMLU Pro",
        task="mmlu_pro",
        metrics=("exact_match,custom-extract",),
        scores={"scout": 0.743, "maverick": 0.805, "behemoth": 0.822},
    ),
    Benchmark(
        title="GPQA Diamond",
        task="gpqa_diamond_cot_zeroshot",
        metrics=("exact_match,flexible-extract",),
        scores={"scout": 0.572, "maverick": 0.698, "behemoth": 0.737},
    ),
    Benchmark(title="MATH-500", task="hendrycks_math500", metrics=("exact_match,none",), scores={"behemoth": 0.950}),
    Benchmark(
        title="Multilingual MMLU",
        task="mmmlu",
        metrics=("acc,none",),
        scores={"maverick": 0.846, "behemoth": 0.858},
    ),
    Benchmark(title="MMLU", task="mmlu", metrics=("acc,none",), scores={"scout": 0.800, "maverick": 0.864}),
    Benchmark(
        title="GSM8K",
        task="gsm8k",
        metrics=("exact_match,flexible-extract",),
        scores={"scout": 0.897, "maverick": 0.922},
    ),
    Benchmark(title="LiveCodeBench", lacking=NO_TASK, scores={"scout": 0.328, "maverick": 0.434, "behemoth": 0.494}),
    Benchmark(title="MTOB", lacking=NO_TASK, scores={}),  # four numbers a model, by direction and length
    Benchmark(title="MMMU", lacking=IMAGES, scores={"scout": 0.694, "maverick": 0.734, "behemoth": 0.761}),
    Benchmark(title="MathVista", lacking=IMAGES, scores={"scout": 0.707, "maverick": 0.737}),
    Benchmark(title="ChartQA", lacking=IMAGES, scores={"scout": 0.888, "maverick": 0.900}),
    Benchmark(title="DocVQA", lacking=IMAGES, scores={"scout": 0.944, "maverick": 0.944}),
)


def published_score(config: ModelConfig, task: str, metric: str) -> float | None:
    """What is published of a model of this shape by the measure of lm-eval's `metric`; None where nothing is."""
    preset = next((name for name, one in PRESETS.items() if _shape(one.model) == _shape(config)), "")
    found = (one.scores.get(preset) for one in BENCHMARKS if one.task == task and metric in one.metrics)
    return next(found, None)


def lacking() -> dict[str, str]:
    """Why -> the published benchmarks that no task measures here, for that reason."""
    reasons = dict.fromkeys(one.lacking for one in BENCHMARKS if one.lacking)
    return {why: ", ".join(one.title for one in BENCHMARKS if one.lacking == why) for why in reasons}


def _shape(config: ModelConfig) -> tuple[object, ...]:
    """What tells the models of the herd from each other, and from a few of their layers."""
    return config.hidden_size, config.num_layers, config.num_local_experts, config.intermediate_size, config.vocab_size
