"""slimtrim against llm-compressor's oneshot: the same model and tokens, both sides in one run, rounds in turn, on a CPU.

    python -m bench.against_llm_compressor --peer VENV/bin/python [--rounds 3] [--json FILE]
    python -m bench.against_llm_compressor --make-peer FOLDER     makes the peer's virtual environment first

GPTQ, 4 bits, experts only. Three comparisons, each a ratio of medians (peer / ours):

* whole time, from the model's path to the closed artifact: loading, calibration, solving, saving; imports apart; nothing is
  evaluated or verified. On a trained Mixtral and on a model of random weights with many experts per layer. The peer runs
  as it comes (the checkpoint's own bf16), loaded as float32 (this matters on a CPU without bf16 instructions), and tuned:
  float32, only the tokens that the router sends (its default shows every token to every expert), experts solved as one
  stack (its default off CUDA is one call per matrix), 16 samples at a time.
* solving alone, one thread, against the peer's kernel function in one call and in one call per matrix.
* perplexity of every artifact on held-out text, beside the original's, by stock transformers.

OMP_NUM_THREADS holds for both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

PEER_PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0.1")
PEER_SCRIPT = Path(__file__).parent / "peers" / "llm_compressor_oneshot.py"
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "auto", "oneshot": {}, "modifier": {}},
    "float32": {"dtype": "float32", "oneshot": {}, "modifier": {}},
    "tuned": {
        "dtype": "float32",
        "oneshot": {"moe_calibrate_all_experts": False, "batch_size": 16},
        "modifier": {"batched_quantization": 64},
    },
}
"""The peer as it comes, and two ways to help it. What is not named is its default."""
PARTS = ("whole", "many", "solving", "quality")
HELD_OUT = {"samples": 128, "sequence_length": 256}


def main() -> None:
    """Run the parts asked for, print one table and write the figures."""
    given = parse()
    peer = find_peer(given)
    if peer is None:
        return
    given.scratch.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"settings": settings(given, peer)}
    print(" ".join(f"{name}={value}" for name, value in figures["settings"].items()))
    if "whole" in given.parts:
        figures["whole"] = whole(given.model, given, peer, rounds=given.rounds)
    if "quality" in given.parts:
        figures["quality"] = quality(given)
    if "many" in given.parts:
        from bench.peers.many_experts import write

        many = write(given.scratch / "many-experts", given.model, experts=given.experts, blocks=given.blocks)
        figures["many"] = whole(many, given, peer, rounds=given.rounds)
    if "solving" in given.parts:
        from bench.peers.solving import compare

        figures["solving"] = compare([str(peer), str(PEER_SCRIPT)], given.scratch, rounds=given.solver_rounds)
        print_solving(figures["solving"])
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="Python interpreter that has llm-compressor")
    parser.add_argument("--make-peer", type=Path, metavar="FOLDER", help="make such a virtual environment, if it is not there")
    parser.add_argument("--model", type=Path, default=Path("../shared/models/mixtral-docs"))
    parser.add_argument("--calibration", type=Path, default=Path("../shared/data/docs/calibration.txt"))
    parser.add_argument("--held-out", type=Path, default=Path("../shared/data/docs/heldout.txt"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens per calibration sample")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--experts", type=int, default=64, help="per layer of the random model")
    parser.add_argument("--blocks", type=int, default=4, help="of the random model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--solver-rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "slimtrim-against-llm-compressor")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for name in ("model", "calibration", "held_out", "scratch"):
        setattr(given, name, getattr(given, name).resolve())
    return given


def find_peer(given: argparse.Namespace) -> Path | None:
    """Return the peer's interpreter, made if that was asked for; say what to do when there is none."""
    peer = given.peer
    if given.make_peer:
        peer = given.make_peer.absolute() / "bin" / "python"
        if not peer.exists():
            subprocess.run([sys.executable, "-m", "venv", str(given.make_peer)], check=True)
            for package in PEER_PACKAGES:  # torch first and by exact version: what the next one needs is then at hand
                subprocess.run([str(peer), "-m", "pip", "install", "--quiet", package], check=True)
    if peer is None:
        print(
            f"NOT MEASURED: there is no llm-compressor to compare with. Install {' and '.join(PEER_PACKAGES)} into a virtual "
            "environment of its own and say --peer VENV/bin/python, or let --make-peer FOLDER do it."
        )
        return None
    probe = [str(peer), "-c", "import importlib.util as u; raise SystemExit(u.find_spec('llmcompressor') is None)"]
    if not Path(peer).exists() or subprocess.run(probe, check=False).returncode:
        raise SystemExit(f"{peer} is no interpreter with llm-compressor; --make-peer FOLDER makes one")
    if missing := [path for path in (given.model, given.calibration, given.held_out) if not path.exists()]:
        raise SystemExit(f"{missing[0]} does not exist; name another with --model, --calibration, --held-out")
    return Path(peer)


def settings(given: argparse.Namespace, peer: Path) -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch

    command = [str(peer), "-c", "import importlib.metadata as m; print(m.version('llmcompressor'))"]
    return {
        "llm-compressor": subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip(),
        "rounds": given.rounds,
        "tokens": f"{given.samples}x{given.length}",
        "group": given.group_size,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def whole(model: Path, given: argparse.Namespace, peer: Path, *, rounds: int) -> dict[str, Any]:
    """Run both sides in turn on one checkpoint; print and return medians, spreads and ratios."""
    requests = write_requests(model, given)
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in requests}
    for number in range(rounds):
        for side, request in requests.items():
            ours = [sys.executable, "-m", "bench.peers.slimtrim_whole", str(request)]
            theirs = [str(peer), str(PEER_SCRIPT), "whole", str(request)]
            answer = run(ours if side == "ours" else theirs, given.scratch / f"{side}.log", given.scratch / model.name / side)
            print(f"  round {number + 1} of {rounds}, {model.name}, {side}: {answer['seconds']:.1f} s", flush=True)
            taken[side].append(answer)
    rows = {side: summary(answers) for side, answers in taken.items()}
    for row in rows.values():
        row["over_ours"] = row["seconds"] / rows["ours"]["seconds"]
        row["processor_over_ours"] = row["processor_seconds"] / rows["ours"]["processor_seconds"]
    print_whole(model.name, rows)
    return rows


def write_requests(model: Path, given: argparse.Namespace) -> dict[str, Path]:
    """Write the calibration tokens once and a request file for each side."""
    from safetensors.torch import save_file

    from compression.calibration import load_calibration
    from compression.request import Calibration

    folder = given.scratch / model.name
    folder.mkdir(parents=True, exist_ok=True)
    text = {"source": given.calibration.as_uri(), "samples": given.samples, "sequence_length": given.length}
    ids = folder / "ids.safetensors"
    save_file({"ids_NS": load_calibration(Calibration.model_validate(text), model).ids_NS.contiguous()}, ids)
    step = {"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": given.group_size}
    compression = {
        "model": model.as_uri(),
        "recipe": {"steps": [step]},
        "calibration": text,
        # Read while planning, never measured: the run ends before.
        "evaluation": {"perplexity": {"source": given.held_out.as_uri(), "samples": 1}},
    }
    common = {"model": str(model), "ids": str(ids)}
    requests = {"ours": {**common, "compression": compression}}
    requests |= {name: {**common, **VARIANTS[name], "group_size": given.group_size} for name in given.variants}
    files: dict[str, Path] = {}
    for side, request in requests.items():
        files[side] = folder / f"{side}.json"
        files[side].write_text(json.dumps({**request, "out": str(folder / side)}))
    return files


def run(command: list[str], log: Path, out: Path) -> dict[str, Any]:
    """Run one side into an empty folder; return the JSON on its last line."""
    shutil.rmtree(out, ignore_errors=True)
    with log.open("w") as file:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=file, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of every figure, and every round's seconds."""
    return {name: median(answer[name] for answer in answers) for name in answers[0]} | {
        "rounds_seconds": [answer["seconds"] for answer in answers]
    }


def quality(given: argparse.Namespace) -> dict[str, Any]:
    """Print and return the perplexity of the original and of the artifacts that the last round left."""
    from bench.peers.quality import judge
    from compression.calibration import load_evaluation
    from compression.request import Perplexity

    wanted = Perplexity.model_validate({"source": given.held_out.as_uri(), **HELD_OUT})
    ids_NS = load_evaluation(wanted, given.model, sequence_length=HELD_OUT["sequence_length"]).ids_NS
    artifacts = {side: given.scratch / given.model.name / side for side in ("ours", *given.variants)}
    folders = {"unquantized": given.model, **{side: path for side, path in artifacts.items() if path.exists()}}
    rows = {side: judge(folder, ids_NS, given.scratch) for side, folder in folders.items()}
    print(f"\n{given.model.name}, perplexity of {ids_NS.numel()} held-out tokens in float32, stock transformers")
    for side, row in rows.items():
        value = "does not open" if row["perplexity"] is None else f"{row['perplexity']:.3f}"
        missing = row["missing_as_written"]
        note = f"as written, {missing} tensors are missing; measured on a copy with its tensors renamed" if missing else ""
        print(f"  {side:14s}{value:>10s}  {note}")
    return rows


def print_whole(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print whole times, and how the peer called its kernel."""
    print(f"\n{name}, from path to artifact, medians; ratios are peer / ours")
    widths = {"seconds": 9, "ratio": 8, "cpu s": 9, "cpu ratio": 11, "import s": 10, "peak MB": 9}
    print(" " * 16 + "".join(f"{head:>{width}s}" for head, width in widths.items()) + "  kernel calls (largest stack)")
    for side, row in rows.items():
        calls = f"{row['calls']:.0f} for {row['modules']:.0f} matrices ({row['largest_stack']:.0f})" if "calls" in row else ""
        print(
            f"  {side:14s}{row['seconds']:9.1f}{row['over_ours']:8.2f}{row['processor_seconds']:9.1f}"
            f"{row['processor_over_ours']:11.2f}{row['import_seconds']:10.1f}{row['peak_bytes'] / 1e6:9.0f}  {calls}"
        )
    if any(row.get("apart_while_loading") == 0 for row in rows.values()):
        print("  the peer has no torchvision: its experts were taken apart after loading, which is its slower way")


def print_solving(rows: list[dict[str, Any]]) -> None:
    """Print the solvers' times and what their results cost."""
    print("\nsolving alone, one thread, processor ms, medians; ratios are peer / ours; error: of the outputs, relative")
    head = ("ours", "stacked", "ratio", "loop", "ratio", "error", "peer's")
    print(f"  {'E x O x I':14s}" + "".join(f"{name:>9s}" for name in head))
    for row in rows:
        ours, stacked, loop = (row[f"{name}_seconds"] * 1e3 for name in ("ours", "stacked", "loop"))
        times = f"{ours:9.0f}{stacked:9.0f}{row['stacked_over_ours']:9.2f}{loop:9.0f}{row['loop_over_ours']:9.2f}"
        print(f"  {row['shape']:14s}{times}{row['ours_output_error']:9.5f}{row['peer_output_error']:9.5f}")


if __name__ == "__main__":
    main()
