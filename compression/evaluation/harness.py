"""``python -m compression.evaluation.harness``: lm-evaluation-harness on one model, in a process of its own.

The harness alone decides what is asked and how it is scored. Names of tasks come from the caller and must stand in its
index; files of tasks, which may hold code, come from the operator's folder alone. A task that would run code which a model
wrote, or be scored by code that the hub serves, is refused.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compression.errors import DownloadFailed, EvaluationFailed, SlimtrimError, ValidationFailed
from compression.evaluation.process import Line, Say, serve

_BY_CHOICE = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics of a multiple choice for which guessing scores one over the number of choices."""
_OF_NETWORK = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub", "aiohttp")
_NOT_REACHED = ("OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError")


def work(given: Line, say: Say) -> Line:
    """Load the tasks, so that what is wrong with them is found; with a ``model``, evaluate it on them."""
    names, folder = given["tasks"], Path(given["folder"]) if given["folder"] else None
    manager = _manager(names, folder)
    loaded = _load(manager, names)
    version = importlib.metadata.version("lm_eval")
    if given.get("model") is None:
        return {"harness": version}
    results = _evaluate(given, manager, say)
    return {"harness": version, "rows": list(_rows(results, names, loaded))}


def _manager(names: list[str], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own  # reading the harness's own index of tasks, of which there are thousands, takes seconds
    manager = TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    for position, name in enumerate(names):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or ["lm_eval ls tasks lists all"]
            raise ValidationFailed(
                f"lm-evaluation-harness knows no task {name!r}; near: {', '.join(near)}",
                pointer=f"/evaluation/benchmarks/{position}",
            )
    return manager


def _load(manager: Any, names: list[str]) -> Mapping[str, Any]:
    import evaluate

    evaluate.load = _refused
    try:
        loaded = manager.load(names)
    except SlimtrimError:
        raise
    except Exception as error:
        raise _named(error) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "shows the model more than text"
            raise ValidationFailed(
                f"task {name} {what}, which is never done here; leave it out", pointer="/evaluation/benchmarks"
            )
    return loaded


def _refused(name: str, *_: Any, **__: Any) -> None:
    raise ValidationFailed(
        f"a task is scored by {name!r}, code that would be fetched from the hub; none is ever run, so leave the task out",
        pointer="/evaluation/benchmarks",
    )


def _named(error: BaseException) -> SlimtrimError:
    link: BaseException | None = error
    while link is not None:
        kind = type(link)
        if isinstance(link, ConnectionError | TimeoutError) or kind.__name__ in _NOT_REACHED or _is_of_network(kind):
            return DownloadFailed(f"the data of a benchmark could not be fetched: {str(error)[:500]}")
        link = link.__cause__ or link.__context__
    return EvaluationFailed(f"a benchmark does not load: {type(error).__name__}: {str(error)[:500]}")


def _is_of_network(kind: type[BaseException]) -> bool:
    return kind.__module__.partition(".")[0] in _OF_NETWORK


def _evaluate(given: Line, manager: Any, say: Say) -> Mapping[str, Any]:
    from lm_eval.models import huggingface

    from compression.evaluation.opened import device_of_run, needs_own_loader, open_whole

    huggingface.tqdm = _telling(huggingface.tqdm, say)  # the harness has no other way of saying how far it is
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    open_by_harness: Any = huggingface.HFLM
    folder = Path(given["model"])
    settings: dict[str, Any] = {"batch_size": given["batch_size"], "device": str(device_of_run())}
    if needs_own_loader(folder):
        model = open_by_harness(pretrained=open_whole(folder), tokenizer=str(folder), **settings)
    else:
        model = open_by_harness(pretrained=str(folder), **settings)
    return evaluator.simple_evaluate(
        model=model, tasks=given["tasks"], limit=given["limit"], task_manager=manager, log_samples=True, **settings
    )


def _telling(bar: Any, say: Say) -> Any:
    class Telling(bar):
        def update(self, n: float | None = 1) -> bool | None:
            answer = super().update(n)
            if self.total:
                say(int(self.n), int(self.total))
            return answer

    return Telling


def _rows(results: Mapping[str, Any], asked: list[str], loaded: Mapping[str, Any]) -> Iterator[Line]:
    """Yield a row per metric of every task asked for; a group gives its own means where it has any, else its tasks."""
    below: set[str] = set()
    members: Mapping[str, list[str]] = loaded.get("group_map") or {}
    for name in members:
        if _metrics(results["results"].get(name, {})):
            below |= _leaves(name, members, with_groups=True) - {name}
    for name, scores in results["results"].items():
        if name in below and name not in asked:
            continue
        for metric in _metrics(scores):
            yield _row(results, name, metric, sorted(_leaves(name, members, with_groups=False)))


def _metrics(scores: Mapping[str, Any]) -> list[str]:
    numbers = (key for key, value in scores.items() if isinstance(value, int | float) and "," in key)
    return [key for key in numbers if not key.partition(",")[0].endswith("_stderr")]


def _leaves(name: str, members: Mapping[str, list[str]], *, with_groups: bool) -> set[str]:
    if name not in members:
        return {name}
    below = set().union(*(_leaves(child, members, with_groups=with_groups) for child in members[name]))
    return below | {name} if with_groups else below


def _row(results: Mapping[str, Any], name: str, metric: str, leaves: list[str]) -> Line:
    base, _, kept = metric.partition(",")
    scores = results["results"][name]
    stderr = scores.get(f"{base}_stderr,{kept}")
    samples = {leaf: results["n-samples"][leaf]["effective"] for leaf in leaves}
    chances = [(_chance(results, leaf, base), samples[leaf]) for leaf in leaves]
    known = all(chance is not None for chance, _ in chances)
    return {
        "task": name,
        "metric": metric,
        "value": scores[metric],
        "stderr": stderr if isinstance(stderr, float) and stderr == stderr else None,
        "task_version": str(results["versions"].get(name, "")),
        "higher_is_better": bool(results["higher_is_better"].get(name, {}).get(base, True)),
        "samples": sum(samples.values()),
        "few_shots": int(results["n-shot"].get(leaves[0], 0) or 0),
        "chance": sum((chance or 0.0) * count for chance, count in chances) / sum(samples.values()) if known else None,
    }


def _chance(results: Mapping[str, Any], task: str, metric: str) -> float | None:
    """Return what guessing scores: the mean over the samples of one over the number of choices; None for other tasks."""
    config, samples = results["configs"][task], results["samples"][task]
    if config.get("output_type") != "multiple_choice" or metric not in _BY_CHOICE or not samples:
        return None
    asked_twice = any(entry.get("metric") == "acc_mutual_info" for entry in config.get("metric_list") or ())
    choices = [len(sample["arguments"]) // (2 if asked_twice else 1) for sample in samples]
    return sum(1 / count for count in choices) / len(choices)


if __name__ == "__main__":
    sys.exit(serve(work))
