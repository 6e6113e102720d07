"""The documentation fails the build when it and the code part ways."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import compression.errors
from api.schemas import JobRequest
from compression.__main__ import read_request
from compression.architectures import ARCHITECTURES
from compression.planner.availability import STEP_FACTS
from compression.recipe import STEPS, step_schema
from jobs.settings import describe_settings
from jobs.status import JobStatus

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
SOURCES = sorted(file for package in ("api", "jobs", "worker", "compression", "bench") for file in (ROOT / package).rglob("*.py"))
METHODS = (DOCS / "methods.md").read_text()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def choices() -> Iterator[tuple[str, str, str]]:
    """Yield every step's settings that are a choice between names: (step, setting, name)."""
    for step, kind in STEPS.items():
        for setting, schema in step_schema(kind)["properties"].items():
            for part in (schema, *schema.get("anyOf", ())):
                names = part.get("enum", [part["const"]] if "const" in part and setting != "step" else [])
                yield from ((step, setting, name) for name in names if isinstance(name, str))


def is_built(step: str, setting: str, name: str) -> bool:
    facts = STEP_FACTS[step]
    return facts.instead is None and name not in facts.missing.get(setting, ())


def mentions(text: str, name: str) -> bool:
    return f"`{name}`" in text or f'`"{name}"`' in text


@pytest.mark.parametrize("step", STEPS)
def test_every_step_stands_in_the_methods_page_where_it_belongs(step: str):
    built, known = METHODS.split("## Known, not built")

    assert f"### `{step}`" in built if STEP_FACTS[step].instead is None else f"`{step}`" in known
    assert (f"### `{step}`" in built) == (STEP_FACTS[step].instead is None)


@pytest.mark.parametrize(("step", "setting", "name"), sorted(set(choices())))
def test_every_choice_stands_in_the_methods_page_where_it_belongs(step: str, setting: str, name: str):
    built, known = METHODS.split("## Known, not built")

    assert mentions(built if is_built(step, setting, name) else known, name)


def test_the_choices_looked_for_are_those_of_the_recipe():
    found = set(choices())

    assert {("quantize", "method", "gptq"), ("expert_drop", "criterion", "reap"), ("layer_drop", "criterion", "cosine")} <= found
    assert ("quantize", "attention", "keep") in found


def test_every_error_code_is_explained():
    errors = [kind for _, kind in inspect.getmembers(compression.errors, inspect.isclass) if hasattr(kind, "code")]
    page = (DOCS / "errors.md").read_text()

    assert len(errors) > 20
    # "stopped" ends a run that was cancelled or lost its lease; no caller is ever answered with it.
    assert [kind.code for kind in errors if kind.code != "stopped" and f"`{kind.code}`" not in page] == []


def test_the_settings_page_is_the_settings():
    rows = []
    for name, (default, text) in describe_settings().items():
        shown = f"`{default}`" if default else "not set"
        rows.append(f"| `{name}` | {shown} | {text} |")

    assert [line for line in (DOCS / "settings.md").read_text().splitlines() if line.startswith("| `")] == rows


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_has_its_line(model_type: str):
    assert re.search(rf"^\| `{model_type}` \|", (DOCS / "adding-an-architecture.md").read_text(), re.MULTILINE)


def test_every_status_is_in_the_walk():
    walk = (DOCS / "architecture.md").read_text()

    assert [status for status in JobStatus if not re.search(rf"\b{status}\b", walk)] == []


def test_decision_records_are_numbered_without_a_gap_and_bear_their_number():
    records = sorted(page for page in (DOCS / "decisions").glob("*.md") if page.name != "template.md")

    assert [int(page.name[:4]) for page in records] == list(range(1, len(records) + 1))
    assert [page.name for page in records if not page.read_text().startswith(f"# {page.name[:4]} ")] == []


@pytest.mark.parametrize("file", [*PAGES, *SOURCES], ids=name_of)
def test_every_decision_named_exists(file: Path):
    text = re.sub(r"\s+", " ", file.read_text())
    passages = re.findall(r"[Dd]ecisions?(?: record)?s? ((?:00\d\d(?:, | and )?)+)|\((00\d\d)\)", text)
    numbers = {number for passage in passages for number in re.findall(r"00\d\d", " ".join(passage))}

    missing = [number for number in numbers if not list((DOCS / "decisions").glob(f"{number}-*.md"))]

    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_and_every_path_leads_somewhere(page: Path):
    text = page.read_text()
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    paths = re.findall(r"`((?:api|jobs|worker|compression|tests|docs|bench|examples)/[\w./-]*)`", text)

    assert [link for link in links if link and not (page.parent / link).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readmes_map_lists_every_room():
    readme = (ROOT / "README.md").read_text()
    rooms = {folder.parent.name for folder in ROOT.glob("[a-z]*/*.*") if folder.parent.name not in ("data", "build")}

    assert {"api", "jobs", "worker", "compression", "tests", "docs"} <= rooms
    assert [room for room in sorted(rooms) if f"| `{room}/` |" not in readme] == []


def test_the_readmes_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r"(?:^    |`|^    \S+=\S+ )make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))

    assert {"demo", "test", "serve", "bench"} <= commands <= targets


def test_the_readmes_job_is_a_request_that_the_service_understands():
    [body] = re.findall(r"<<END\n(.*?)\n\s*END\n", (ROOT / "README.md").read_text(), re.DOTALL)

    request = JobRequest.model_validate(json.loads(body.replace("$PWD", "/somewhere")))

    assert request.target_memory == 1_840_000


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=name_of)
def test_the_recipes_that_come_along_are_legal(recipe: Path):
    assert read_request(recipe, ROOT).recipe != "auto"


def test_every_promise_names_tests_that_exist():
    page = (DOCS / "promises.md").read_text()
    rows = re.findall(r"^\| (P\d+) \|.*\|(.*)\|$", page, re.MULTILINE)

    assert [name for name, _ in rows] == [f"P{number}" for number in range(1, 12)]
    for name, proofs in rows:
        files = re.findall(r"`(tests/[^`]+)`", proofs)
        assert files, name
        assert [file for file in files if not (ROOT / file).is_file()] == []
