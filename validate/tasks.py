"""Tasks of lm-eval on bundles: names -> what each build scores, beside what is published of the model."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.spec.errors import EnvironmentProblem, InputError
from corral.spec.manifest import MANIFEST_NAME
from corral.spec.progress import Progress, silent
from corral.validate.published import BENCHMARKS, published_score

LLAMA4 = "llama4"  # in place of a name: the published tasks that lm-eval has
BOOTSTRAPS = 1000  # of standard errors that have no formula


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What one build scored by one metric of one task. `metric` is lm-eval's "name,filter"; `stderr` None: it has none."""

    build: str
    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    published: float | None  # of the model that the build is of


class Tasks:
    """The tasks of these names, loaded: also `llama4` and YAML files of tasks.

    Loading fetches data sets from the Hub, and runs the Python code that a task names. Raises InputError for an unknown
    name and EnvironmentProblem where a task cannot be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; progress is told in corral's own way
        from lm_eval.tasks import TaskManager

        herd = [benchmark.task for benchmark in BENCHMARKS if benchmark.task]
        self.names = list(dict.fromkeys(one for name in names for one in (herd if name == LLAMA4 else [name])))
        files = {name for name in self.names if Path(name).is_file()}
        self._manager = TaskManager(include_defaults=len(files) < len(self.names))  # its thousands take seconds to list
        for name in self.names:
            if name not in files and name not in self._manager.task_index:
                near = difflib.get_close_matches(name, self._manager.all_tasks, 3)
                raise InputError(
                    f'"{name[:80]}" is no task of lm-eval and no YAML file of one; expected a name such as '
                    f"{', '.join(near or ['mmlu', 'gsm8k'])}, or {LLAMA4}. `lm-eval ls tasks` lists them."
                )
        self.shown = [one for name in self.names for one in self._load(name)]

    def _load(self, name: str) -> list[str]:
        """What lm-eval calls the results of a name: a task, a group, or the tasks of a tag."""
        try:
            loaded = self._manager.load([name])
        except Exception as error:  # whatever a task's own code raises
            raise EnvironmentProblem(
                f"lm-eval cannot load the task {name}: {type(error).__name__}: {str(error)[:300]} Data sets are fetched from "
                "the Hub; some ask for an agreement there and for HF_TOKEN, some tasks for a further package."
            ) from error
        return list(loaded["groups"])[:1] or list(loaded["tasks"])

    def run(
        self,
        path: Path,
        *,
        limit: int | None,
        chat: bool,
        provider: str,
        threads: int | None,
        progress: Progress = silent,
    ) -> list[TaskScore]:
        """Run them on the bundle at `path`, on the first `limit` documents of each; `chat` asks by the chat template."""
        from lm_eval.evaluator import simple_evaluate

        from corral.runtime import LLM
        from corral.validate.lm_eval_model import BundleLM

        llm = LLM(path, provider=provider, threads=threads, progress=progress)
        model = BundleLM(llm, lambda done, total: progress("tasks", done, total, "requests"))
        found = simple_evaluate(
            model=model,
            tasks=self.names,
            task_manager=self._manager,
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
        assert found is not None
        name = path.resolve().name
        return [score for task in self.shown for score in _scores(found, task, name, llm.config)]


def run_tasks(tasks: Tasks, paths: Sequence[Path], **how: Any) -> tuple[TaskScore, ...]:
    """What the bundles among `paths` score; a checkpoint is not run, for that would be PyTorch without a cache."""
    bundles = [path for path in paths if (path / MANIFEST_NAME).is_file()]
    return tuple(score for path in bundles for score in tasks.run(path, **how))


def _scores(found: Any, task: str, build: str, config: Any) -> Iterator[TaskScore]:
    results = found["results"][task]
    documents = sum(found["n-samples"][one]["effective"] for one in found["n-samples"] if one in _tasks_of(found, task))
    for metric, value in results.items():
        name, _, kept = metric.partition(",")
        if not kept or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{name}_stderr,{kept}")
        yield TaskScore(
            build=build,
            task=task,
            metric=metric,
            value=float(value),
            stderr=float(error) if isinstance(error, int | float) else None,
            documents=documents,
            published=published_score(config, task, metric),
        )


def _tasks_of(found: Any, task: str) -> set[str]:
    """A task itself, and all below a group."""
    below = found.get("group_subtasks", {}).get(task, [])
    return {task}.union(*(_tasks_of(found, one) for one in below))
