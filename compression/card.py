"""The artifact's README.md: metadata for the hub, the worst news, what was done, how to open it, how to make it again.

Names and settings are strangers' text: the metadata is written by a YAML library, and names in prose stand as code.
"""

from __future__ import annotations

from typing import Any

import yaml

from compression.report import Report


def model_card(report: Report) -> str:
    """Return the card; it says nothing of a licence, which is the base model's."""
    name = _name(report)
    metadata = yaml.safe_dump(_metadata(report), sort_keys=False, allow_unicode=True)
    lost = "\n".join(f"- {_plain(line)}" for line in report.lost)
    steps = "\n".join(f"- `{step['step']}`: {_settings(step)}" for step in report.steps)
    recipe = yaml.safe_dump({"recipe": {"steps": list(report.steps)}}, sort_keys=False, allow_unicode=True)
    quality = report.quality
    return f"""---
{metadata}---

# {_plain(name)}, made smaller by slimtrim

## What was lost

{lost}

| | original | this artifact |
|---|---|---|
| bytes of tensors | {report.bytes_before} | {report.bytes_after} ({report.ratio:.2f} times smaller) |
| perplexity | {quality.perplexity_before:.3f} | {quality.perplexity_after:.3f} |
| divergence from the original | 0 | {quality.divergence:.4f} nats per token |

The worst retention over everything measured is {report.retention:.1%}.

## What was done

{steps}

## How to open it

{_how_to_open(report)} Opened again before publication with {report.verification.opened_with}: largest difference of a
logit {report.verification.largest_logit_difference}. Every number is in `report.json`, and drawn in `report.html`.
{_vllm(report)}
## How to make it again

`python -m compression recipe.yaml model/ out/`, with these steps in recipe.yaml; the texts for calibration and evaluation are
named in `report.json`:

{_indented(recipe)}"""


def _metadata(report: Report) -> dict[str, Any]:
    quantized = any(step["step"] == "quantize" for step in report.steps)
    name = _name(report)
    base = {"base_model": name, "base_model_relation": "quantized" if quantized else "finetune"}
    return {
        **(base if name == report.model else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "slimtrim", *(["compressed-tensors"] if quantized else [])],
        "model-index": [{"name": f"{name}, made smaller by slimtrim", "results": _results(report)}],
    }


def _results(report: Report) -> list[dict[str, Any]]:
    perplexity = report.quality.perplexity_after
    results = [_result("held-out text", "held-out", "perplexity", "perplexity", perplexity)]
    for row in report.benchmarks.rows if report.benchmarks is not None else ():
        results.append(_result(row.task, row.task, row.metric.split(",")[0], row.metric, row.after))
    return results


def _result(dataset: str, kind: str, metric: str, metric_name: str, value: float) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": dataset, "type": kind},
        "metrics": [{"type": metric, "name": metric_name, "value": value}],
    }


def _name(report: Report) -> str:
    return report.model.rstrip("/").rsplit("/", 1)[-1] if "://" in report.model else report.model


def _plain(text: str) -> str:
    """Return text that markdown shows as it is, on one line."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _vllm(report: Report) -> str:
    if report.verification.rules_of_vllm == "not followed":
        return ""
    return "\nFor vLLM: `vllm serve ./this-folder`. The plan follows its published rules; vLLM itself was not run.\n"


def _how_to_open(report: Report) -> str:
    unpacked, packed = report.memory["transformers"], report.memory["packed_engine"]
    if not report.verification.opened_with.startswith("transformers "):
        return (
            f"Profile `{report.profile}`: {_why_own_loader(report)}, which no stock class opens. Open it with `from "
            "slimtrim_runtime import open_model; open_model(folder)`, or `AutoModelForCausalLM.from_pretrained(folder, "
            "trust_remote_code=True)`; the file lies in this folder and needs torch, transformers and safetensors. It unpacks "
            f"while it loads and then needs about {unpacked} bytes."
        )
    limits = "; vLLM reads none but 8-bit and 4-bit weights" if report.profile == "custom" else ""
    return (
        f"Profile `{report.profile}`: opens in stock transformers with `AutoModelForCausalLM.from_pretrained`{limits}. Stock "
        f"transformers unpacks quantized experts when it loads them and then needs about {unpacked} bytes; an engine that "
        f"computes on packed weights needs {packed}."
    )


def _why_own_loader(report: Report) -> str:
    """Say what of the artifact stock classes cannot describe."""
    kept = {len(row.experts_kept) for row in report.blocks if row.experts_kept is not None}
    reasons = {
        "blocks keep different numbers of experts": len(kept) > 1 or any(count < 2 for count in kept),
        "blocks have lost their MoE layer": any(row.moe_layer == "drop" for row in report.blocks),
        "experts are skipped at run time": any(row.skip_beta is not None for row in report.blocks),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return " and ".join(found or ["pruned weights are stored without their zeros"])


def _settings(step: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in step.items() if key != "step" and value is not None)
