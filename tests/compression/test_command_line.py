"""``python -m compression RECIPE.yaml MODEL OUT`` needs no service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = [{"step": "expert_drop", "criterion": "frequency", "experts_kept": 4}, {"step": "quantize", "method": "rtn"}]
TEXT = {
    "calibration": {"source": {"inline": ["one two three four " * 60]}, "samples": 4, "sequence_length": 32},
    "evaluation": {"perplexity": {"source": {"inline": ["zebras never ate oranges quickly " * 40]}, "samples": 2}},
}


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "compression", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_recipe_file_compresses_a_folder_and_prints_what_was_lost(tiny_model_factory, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"recipe": {"steps": STEPS}, **TEXT}))

    done = command(tmp_path / "recipe.yaml", tiny_model_factory("mixtral", dtype="bfloat16"), tmp_path / "out")

    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert f"{report['bytes_after']:,}" in done.stderr
    assert "Perplexity went from" in done.stderr
    assert "100" in done.stderr  # the bar reached its end


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("steps: [{step: quantize, bits: 4}]", "bits"),
        ("steps: [", "cannot read"),
        ("just words", "neither a list of steps nor a request"),
        ("steps: [{step: recover, method: lora}]", "not_available"),
        ("steps: [{step: quantize, scheme: W3A16}]", "not_loadable_in_profile"),
        ("steps: [{step: expert_drop, experts_kept: 1}]", "impossible_step"),
    ],
)
def test_a_bad_recipe_is_one_clear_line_and_exit_code_1(tiny_model_factory, tmp_path, content, said):
    (tmp_path / "recipe.yaml").write_text(content)

    done = command(tmp_path / "recipe.yaml", tiny_model_factory("mixtral", dtype="bfloat16"), tmp_path / "out")

    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_existing_artifact_is_not_overwritten(tiny_model_factory, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(STEPS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")

    done = command(tmp_path / "recipe.yaml", tiny_model_factory("mixtral", dtype="bfloat16"), tmp_path / "out")

    assert done.returncode == 1
    assert "not empty" in done.stderr
    assert (tmp_path / "out" / "precious").read_text() == "mine"
