"""Files that only a run reads, written by a stranger: a refusal by name, and nothing that the maker's code could do."""

from __future__ import annotations

import ast
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compression.checkpoint.headers import FolderFiles
from compression.checkpoint.reader import Reader
from compression.checkpoint.writer import Writer
from compression.errors import BrokenCheckpoint, SourceNotAllowed, ValidationFailed
from compression.pipeline import compress
from compression.request import Compression
from compression.text import documents
from compression.text.documents import read_documents

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the expert the router chose was not the one that the other tokens had wanted so they went home "
GENERATION = "generation_config.json"


@pytest.fixture
def model(tiny_model_factory: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_factory("mixtral", dtype="bfloat16"), tmp_path / "model"))


def run(folder: Path, out: Path) -> None:
    request = {
        "model": folder.as_uri(), "recipe": {"steps": [{"step": "quantize", "method": "rtn"}]},
        "calibration": {"source": {"inline": [WORDS * 20]}, "samples": 8, "sequence_length": 32},
        "evaluation": {"perplexity": {"source": {"inline": [WORDS[::-1] * 8]}, "samples": 4}},
    }  # fmt: skip
    compress(Compression.model_validate(request), folder, out)


def spoilt_tokenizer(folder: Path, **changes: Any) -> bytes:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    return json.dumps({**tokenizer, **changes}).encode()


def far_ids(folder: Path) -> bytes:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = {token: number + 10**6 for token, number in model["vocab"].items()}
    return spoilt_tokenizer(folder, model={**model, "vocab": vocabulary}, added_tokens=[], post_processor=None)


BROKEN: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "garbage": ("tokenizer.json", lambda folder: b"\x00\xff" * 100),
    "a list": ("tokenizer.json", lambda folder: b"[]"),
    "nothing": ("tokenizer.json", lambda folder: b""),
    "deep": ("tokenizer.json", lambda folder: b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "no model": ("tokenizer.json", lambda folder: spoilt_tokenizer(folder, model={})),
    "ids beyond the embedding": ("tokenizer.json", far_ids),
    "settings not UTF-8": ("tokenizer_config.json", lambda folder: b"\xff"),
    "settings a list": ("tokenizer_config.json", lambda folder: b"[]"),
    "special tokens cut off": ("special_tokens_map.json", lambda folder: b"{"),
    "added tokens a list": ("added_tokens.json", lambda folder: b"[[]]"),
    "generation garbage": (GENERATION, lambda folder: b"\xff\xfe"),
    "generation a list": (GENERATION, lambda folder: b"[1]"),
    "generation of odd types": (GENERATION, lambda folder: b'{"cache_implementation": 7, "temperature": []}'),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_companion_is_refused_by_name_before_a_block_is_read(model: Path, tmp_path: Path, fault: str):
    name, content = BROKEN[fault]
    (model / name).write_bytes(content(model))

    with pytest.raises(BrokenCheckpoint, match=r"tokenizer|generation_config") as refusal:
        run(model, tmp_path / "out")

    assert len(refusal.value.message) < 1000
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_code_beside_a_stock_model_is_neither_imported_nor_copied(model: Path, tmp_path: Path):
    ran = tmp_path / "the code ran"
    (model / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text())
        code = {each: "modeling_own.Own" for each in ("AutoConfig", "AutoModelForCausalLM")} | {
            "AutoTokenizer": ["modeling_own.Own", None]
        }
        (model / name).write_text(json.dumps({**settings, "auto_map": code}))
    (model / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.mkdir('" + str(ran) + "') }}")

    run(model, tmp_path / "out")

    assert not ran.exists()
    assert not (tmp_path / "out" / "modeling_own.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_companion_that_became_a_link_out_of_the_folder_is_not_copied_into_the_artifact(model: Path, tmp_path: Path):
    (tmp_path / "secret.json").write_text('"secret"')
    (tmp_path / "out").mkdir()
    writer = Writer(tmp_path / "out", json.loads((model / "config.json").read_text()))
    (model / "notes.json").symlink_to(tmp_path / "secret.json")

    with pytest.raises(SourceNotAllowed, match=r"notes\.json"):
        writer.finish(model)

    assert not (tmp_path / "out" / "notes.json").exists()


def test_weights_that_became_a_link_out_of_the_folder_are_not_read(model: Path, tmp_path: Path):
    reader = Reader(model)
    shutil.move(model / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")

    with pytest.raises(SourceNotAllowed, match="leads out"):
        reader.block(0)


def test_a_folder_that_becomes_a_link_while_a_file_is_opened_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The race is run by hand: the folder is turned after it was resolved and before it is opened."""
    for name in ("root/model", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(name)
    files, resolve = FolderFiles(tmp_path / "root/model", tmp_path / "root"), Path.resolve

    def turned(path: Path, strict: bool = False) -> Path:
        found = resolve(path, strict)
        if path.name == "config.json":
            (tmp_path / "root/model").rename(tmp_path / "root/gone")
            (tmp_path / "root/model").symlink_to(tmp_path / "outside")
        return found

    monkeypatch.setattr(Path, "resolve", turned)
    with pytest.raises(SourceNotAllowed, match="leads out"):
        files.open("config.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_of_json_is_never_held_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(documents, "_LONGEST_LINE", 10**6)
    good, long = b'{"text": "good"}\n', b'{"text": "' + b"x" * 10**8 + b'"}\n'
    (tmp_path / name).write_bytes(gzip.compress(good + long, 1) if name.endswith("gz") else good + long)
    texts = read_documents(f"file://{tmp_path}/{name}", "calibration", pointer="/calibration/source")

    assert next(texts).text == "good"
    with pytest.raises(ValidationFailed, match=r"line 2 of .* is longer than 1000000 bytes"):
        next(texts)


FORBIDDEN = {
    "pickle": "runs code", "cPickle": "runs code", "dill": "runs code", "cloudpickle": "runs code", "marshal": "runs code",
    "shelve": "is pickle", "joblib": "is pickle",
}  # fmt: skip


def _calls(tree: ast.AST) -> list[str]:
    """Return what is called and imported, as dotted words."""
    found = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return found + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def dangers_in(source: str) -> list[str]:
    """Return what in a module could run a stranger's code."""
    tree = ast.parse(source)
    bad = {
        "torch.load",
        "torch.jit.load",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "eval",
        "exec",
        "compile",
        "__import__",
    }
    found = [call for call in _calls(tree) if call in bad or call.split(".")[0] in FORBIDDEN]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "weights_only", "shell"):
            harmless = isinstance(node.value, ast.Constant) and node.value.value == (node.arg == "weights_only")
            found += [] if harmless else [ast.unparse(node)]
    return found


def test_nothing_that_runs_a_strangers_code_is_ever_called():
    modules = [path for package in ("api", "jobs", "worker", "compression") for path in (ROOT / package).rglob("*.py")]

    assert len(modules) > 100
    assert {str(path.relative_to(ROOT)): dangers for path in modules if (dangers := dangers_in(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    ["torch.load(path)", "import pickle", "from pickle import loads", "yaml.load(text)", "f(trust_remote_code=True)", "eval(x)",
     "numpy.load(path, allow_pickle=True)", "f(trust_remote_code=setting)"],
)  # fmt: skip
def test_such_a_line_would_be_noticed(line: str):
    assert dangers_in(line)


def test_pickles_beside_the_model_are_neither_opened_nor_copied(model: Path, tmp_path: Path):
    ran, names = tmp_path / "unpickled", ("x.bin", "tokenizer.pkl", "optimizer.pt", "tokenizer.pth", "scheduler.ckpt", "x.npy")
    for name in names:
        (model / name).write_bytes(b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")

    run(model, tmp_path / "out")

    assert not ran.exists()
    assert not [name for name in names if (tmp_path / "out" / name).exists()]
