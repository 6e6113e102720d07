"""The demo's parts, each without the minutes that the whole takes."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.plan import make_plan
from compression.request import Compression
from examples.demo.errors import DemoFailed
from examples.demo.language import END, pack, perplexity, train_tokenizer, unigram_perplexity, windows
from examples.demo.run_demo import SHARE, Demo, request_for
from examples.demo.service import Service, free_port
from examples.demo.text import Document, docstrings, documents, split
from examples.demo.train_model import Settings, Trained, judge, new_model, prepare, rate, save
from slimtrim_client import JobFailed

TINY = Settings(vocabulary=300, width=64, expert_width=64, blocks=2, sequence=16, batch=2, steps=3, heldout_share=0.3)
TEXTS = [Document(f"document {number}", f"Chapter {number}. " + "The list is sorted in place. " * 12) for number in range(6)]


def silent() -> Console:
    return Console(file=io.StringIO())


# The text


@pytest.fixture(scope="module")
def found() -> list[Document]:
    return documents()


def test_no_passage_of_the_held_out_part_stands_in_the_training_part(found: list[Document]):
    train, heldout = split(found, heldout_share=0.1, seed=0)

    def passages(part: list[Document]) -> set[str]:
        paragraphs = (" ".join(paragraph.split()) for document in part for paragraph in document.text.split("\n\n"))
        return {paragraph for paragraph in paragraphs if len(paragraph) >= 60}

    assert len(passages(heldout)) > 300
    assert passages(train).isdisjoint(passages(heldout))


def test_the_split_is_the_same_every_time_and_leaves_no_document_out(found: list[Document]):
    train, heldout = split(found, heldout_share=0.1, seed=0)
    again = split(list(reversed(found)), heldout_share=0.1, seed=0)

    size = sum(len(document.text) for document in found)
    assert (train, heldout) == again
    assert sorted(document.name for document in (*train, *heldout)) == sorted(document.name for document in found)
    assert 0.1 <= sum(len(document.text) for document in heldout) / size < 0.15
    assert split(found, heldout_share=0.1, seed=1) != again


def test_docstrings_are_those_of_module_classes_and_functions():
    source = '"""M."""\n"not one"\nclass C:\n    """C."""\n    async def f(self):\n        """F."""\n        x = """no"""\n'

    assert list(docstrings(source)) == ["M.", "C.", "F."]


def test_reading_the_modules_imports_none_of_them():
    script = (
        "import sys; from examples.demo.text import MODULES, documents; before = set(sys.modules);"
        "documents(); print([name for name in MODULES if name in set(sys.modules) - before])"
    )

    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "[]"


# What a language model is judged by


def test_the_unigram_perplexity_is_the_one_worked_out_by_hand():
    train_T = torch.tensor([0, 0, 1])
    heldout_NS = torch.tensor([[2, 0, 1]])

    # Add one to counts 2, 1, 0: probabilities 3/6, 2/6, 1/6. The window's first token is not charged.
    assert unigram_perplexity(train_T, heldout_NS, 3) == pytest.approx(math.sqrt((6 / 3) * (6 / 2)))


def test_perplexity_is_the_exponential_of_the_stock_models_own_loss():
    tokenizer = train_tokenizer([document.text for document in TEXTS], TINY.vocabulary)
    model = new_model(TINY, tokenizer).eval()
    model.config.output_router_logits = False  # whose loss would otherwise hold the balance term too
    ids_NS = torch.randint(0, TINY.vocabulary, (5, 12), generator=torch.Generator().manual_seed(0))

    stock = model(input_ids=ids_NS, labels=ids_NS).loss.item()

    # 1e-5: one mean over 55 float32 losses against sums over batches of 3 and 2 windows
    assert math.log(perplexity(model, ids_NS, batch=3)) == pytest.approx(stock, rel=1e-5)


def test_any_text_can_be_spelled_and_read_back():
    tokenizer = train_tokenizer(["plain words only"], 300)
    text = "Grüße, 世界 \U0001f9ca\n\ttabs\0"

    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_text_is_closed_by_the_end_token_and_windows_are_whole():
    tokenizer = train_tokenizer(["ab"], 258)
    ids_T = pack(tokenizer, ["ab", "b"])
    end = tokenizer.convert_tokens_to_ids(END)

    assert (ids_T == end).nonzero().flatten().tolist() == [ids_T.tolist().index(end), len(ids_T) - 1]
    assert windows(torch.arange(7), 2, offset=1).tolist() == [[1, 2], [3, 4], [5, 6]]


# Training


def test_the_learning_rate_starts_small_peaks_once_and_ends_at_zero():
    rates = [rate(used / 1000) for used in range(1001)]

    peak = rates.index(max(rates))
    assert 0 < rates[0] < 0.11
    assert max(rates) == pytest.approx(1.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("seconds_per_step", "expected"),
    [(0.001, 1200), (0.2, 750), (10.0, 700)],
    ids=["a fast machine makes every step", "a slow one stops in time", "a very slow one makes the fewest that suffice"],
)
def test_training_ends_after(seconds_per_step: float, expected: int):
    settings = Settings(steps=1200, seconds=150.0, fewest_steps=700)
    step = 0

    while settings.used(step, step * seconds_per_step) < 1.0:
        step += 1

    assert step == expected


def test_what_was_made_is_a_stock_checkpoint_in_bf16_beside_disjoint_texts(tmp_path: Path):
    trained = prepare(tmp_path, TINY, TEXTS, silent())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lines = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("calibration", "heldout")}
    assert isinstance(model, MixtralForCausalLM)
    assert model.dtype is torch.bfloat16
    assert trained.steps == 3
    assert sorted(json.loads(line)["text"] for part in lines.values() for line in part) == sorted(d.text for d in TEXTS)


def test_the_same_settings_and_text_train_once_and_others_train_again(tmp_path: Path):
    first = prepare(tmp_path, TINY, TEXTS, silent())
    stamp = (tmp_path / "model/model.safetensors").stat().st_mtime_ns

    second = prepare(tmp_path, TINY, TEXTS, silent())
    kept = (tmp_path / "model/model.safetensors").stat().st_mtime_ns == stamp
    third = prepare(tmp_path, TINY, TEXTS[:-1], silent())

    assert second == first
    assert kept
    assert third.fingerprint != first.fingerprint


def test_a_model_no_better_than_counting_words_is_refused():
    learned = Trained(
        fingerprint="", steps=1, train_seconds=1, train_tokens=1, heldout_tokens=1, unigram_perplexity=300, perplexity=99.9
    )
    not_learned = Trained(
        fingerprint="", steps=1, train_seconds=1, train_tokens=1, heldout_tokens=1, unigram_perplexity=300, perplexity=100.1
    )

    judge(learned, silent())
    with pytest.raises(DemoFailed, match="learned too little"):
        judge(not_learned, silent())


# The request


def test_the_demos_recipe_leaves_at_most_a_quarter_of_the_demos_model(tmp_path: Path):
    settings = Settings()
    tokenizer = train_tokenizer([document.text for document in TEXTS], settings.vocabulary)
    save(new_model(settings, tokenizer), tokenizer, tmp_path / "model")
    checkpoint = read_checkpoint(FolderFiles(tmp_path / "model"))
    request = request_for(tmp_path)

    before = make_plan(Compression.model_validate(_known(request)), checkpoint).bytes_before
    plan = make_plan(Compression.model_validate(_known(request) | {"target_memory": before // SHARE}), checkpoint)

    assert plan.feasible
    assert plan.bytes_after <= before // SHARE
    assert {step["step"] for step in plan.steps} == {"expert_drop", "block_drop", "quantize"}


def _known(request: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name in Compression.model_fields}


# The service


def test_a_service_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path):
    command = (sys.executable, "-c", "import sys; print('no room for the database'); sys.exit(3)")

    with pytest.raises(DemoFailed, match=r"exit status 3:\nno room for the database"), Service(tmp_path, command):
        pass


ANSWERS_READY = """
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, {on_term})
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
print(sorted(name for name in os.environ if name.startswith("SLIMTRIM_")), flush=True)
http.server.HTTPServer(("127.0.0.1", int(os.environ["SLIMTRIM_PORT"])), Handler).serve_forever()
"""


@pytest.mark.parametrize("on_term", ["signal.SIG_DFL", "signal.SIG_IGN"], ids=["obedient", "deaf"])
def test_the_service_ends_when_what_it_served_fails(tmp_path: Path, on_term: str):
    service = Service(tmp_path, (sys.executable, "-c", ANSWERS_READY.format(on_term=on_term)), stop_s=0.3)

    def fail_inside() -> None:
        with service:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()

    assert service._process.poll() is not None


def test_another_services_settings_do_not_reach_the_demos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIMTRIM_API_KEYS", "someone:jobs:read:00")
    monkeypatch.setenv("SLIMTRIM_DATABASE_URL", "sqlite:////somewhere/else")

    with Service(tmp_path, (sys.executable, "-c", ANSWERS_READY.format(on_term="signal.SIG_DFL"))):
        pass

    names = set(re.findall(r"SLIMTRIM_\w+", (tmp_path / "service.log").read_text()))
    assert {"SLIMTRIM_DATA_DIR", "SLIMTRIM_MODEL_ROOTS", "SLIMTRIM_PORT"} <= names
    assert names.isdisjoint({"SLIMTRIM_API_KEYS", "SLIMTRIM_DATABASE_URL"})


def test_a_free_port_is_free():
    port = free_port()

    ThreadingHTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler).server_close()


# Following the job


class ScriptedClient:
    """Stands in for the service: yields the given jobs, then raises what is given."""

    def __init__(self, *jobs: dict[str, Any], then: BaseException | None = None) -> None:
        self.jobs = jobs
        self.then = then
        self.cancelled: list[str] = []

    def follow(self, job_id: str) -> Iterator[dict[str, Any]]:
        yield from self.jobs
        if self.then is not None:
            raise self.then

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)


def job(status: str, reason: dict[str, Any] | None = None) -> dict[str, Any]:
    progress = {"fraction": 0.5, "message": None}
    return {"id": "job_x", "status": status, "stage": "studying", "progress": progress, "status_reason": reason}


def test_a_job_that_fails_fails_the_demo_with_its_reason(tmp_path: Path):
    client: Any = ScriptedClient(job("running"), job("failed", {"code": "disk_full", "message": "no room", "retryable": True}))

    with pytest.raises(JobFailed, match="job_x failed: disk_full: no room"):
        Demo(tmp_path, silent())._follow(client, "job_x")


def test_an_interrupted_demo_cancels_its_job(tmp_path: Path):
    client: Any = ScriptedClient(job("running"), then=KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        Demo(tmp_path, silent())._follow(client, "job_x")

    assert client.cancelled == ["job_x"]
