"""Results of tasks as one JSON object, with their intervals and provenance."""

import hashlib
import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

import opendeep_jax
from opendeep_jax.config.schema import ModelConfig, to_dict
from opendeep_jax.evaluation.intervals import interval_of
from opendeep_jax.models.accounting import count_parameters

MARK = ","
"""Between a metric's name and its filter's, in the harness' results."""


def describe_model(config: ModelConfig, name: str, source: str, step: int | None = None) -> dict[str, Any]:
    """Describe the model: its name, its origin, and the SHA-256 of its configuration as sorted JSON."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return {
        "name": name,
        "source": source,
        "step": step,
        "config_sha256": _sha256(text),
        "parameters": count_parameters(config).total,
        "dtype": config.dtype,
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"opendeep": opendeep_jax.__version__, "jax": jax.__version__, "python": platform.python_version()}
    for package in ("lm-eval", "tokenizers"):
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            continue
    return found


def task_results(raw: dict[str, Any]) -> dict[str, Any]:
    """Return for each task and group metrics with standard errors and 95% intervals, examples counted, and each
    example's prompt hashes, answers and scores.

    Args:
        raw: What `harness.run_tasks` gives.
    """
    found = {}
    for name, values in (raw["results"] | raw.get("groups", {})).items():
        samples = raw.get("samples", {}).get(name, [])
        metrics = {
            key: _metric(key, value, values, samples, raw.get("higher_is_better", {}).get(name, {}))
            for key, value in values.items()
            if MARK in key and not key.partition(MARK)[0].endswith("_stderr")
        }
        if not metrics and not samples:
            continue  # a group that only gathers
        found[name] = {
            "version": raw.get("versions", {}).get(name),
            "num_fewshot": raw.get("n-shot", {}).get(name),
            "n": raw.get("n-samples", {}).get(name, {}).get("effective", values.get("sample_len")),
            "metrics": metrics,
            "samples": [_sample(sample) for sample in samples],
        }
    return found


def _metric(key: str, value: Any, values: dict, samples: list[dict], better: dict) -> dict[str, Any]:
    metric, _, of_filter = key.partition(MARK)
    error = values.get(f"{metric}_stderr{MARK}{of_filter}")
    error = _plain(error) if isinstance(error, int | float) else None
    scores = [sample[metric] for sample in samples if sample["filter"] == of_filter and metric in sample]
    value = _plain(value)
    return {
        "value": value,
        "standard_error": error,
        "interval": interval_of(value, error, scores) if isinstance(value, int | float) else None,
        "higher_is_better": better.get(metric),
    }


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return an example with its text replaced by the prompt's hash."""
    return {
        "id": sample["doc_id"],
        "filter": sample["filter"],
        "prompt_sha256": [_sha256(_request_text(arguments)) for arguments in sample["arguments"]],
        "target": str(sample["target"]),
        "answers": _plain(sample["filtered_resps"]),
        "scores": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
    }


def _request_text(arguments: tuple) -> str:
    """Return the text of a request that the model read: a context, with the continuation if it was scored."""
    return "".join(part for part in arguments if isinstance(part, str))


def _plain(value: Any) -> Any:
    """Return a value for JSON: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def table(tasks: dict[str, Any]) -> Any:
    """The metrics as a table for the terminal."""
    from rich.table import Table

    shown = Table("task", "n", "shots", "metric", "value", "std. error")
    shown.add_column("95% interval", no_wrap=True)
    for name, task in tasks.items():
        for key, metric in task["metrics"].items():
            label = key.removesuffix(f"{MARK}none").replace(MARK, ", ")
            low_high, error, value = metric["interval"], metric["standard_error"], metric["value"]
            shown.add_row(
                name,
                str(task["n"] or ""),
                "" if task["num_fewshot"] is None else str(task["num_fewshot"]),
                label,
                f"{value:.4f}" if isinstance(value, int | float) else str(value),
                "" if error is None else f"{error:.4f}",
                "" if low_high is None else f"{low_high[0]:.4f}, {low_high[1]:.4f}",
            )
    return shown
