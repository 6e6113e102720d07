"""The dashboard without a browser: who gets in, what a form may do, what strangers' words become, and what pages say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from api.dashboard.drafts import body_of
from api.dashboard.guard import COOKIE
from api.dashboard.live import LOOK_EVERY_S
from api.dashboard.sessions import Session, Sessions
from api.dashboard.words import size
from jobs.database import reading
from jobs.keys import SCOPES, ApiKey, new_key
from jobs.tables import Job
from tests.api.checkpoints import write_mixtral
from tests.api.conftest import LOOPBACK, Databases, Face, OpenFace

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
SCRIPT = "<script>alert(1)</script>"


def token_of(page: str) -> str:
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page)
    assert found is not None, page[:2000]
    return found[1]


def key_of(page: str) -> str:
    found = re.search(r'name="key" value="([\w-]+)"', page)
    assert found is not None, page[:2000]
    return found[1]


def post(face: Face, path: str, page: str, **fields: str):
    """Send a form as the page would; leads are not followed."""
    return face.client.post(path, data={"token": token_of(page), **fields}, follow_redirects=False)


def draft(face: Face, **fields: str) -> dict[str, str]:
    return {"model": face.model, "recipe": "steps", "steps": '[{"step": "quantize"}]', **fields}


@contextmanager
def locked(open_face: OpenFace, *callers: tuple[str, tuple[str, ...]]) -> Iterator[tuple[Face, list[str]]]:
    """A service with keys, and those keys."""
    made = [new_key(name, scopes) for name, scopes in callers]
    with open_face(api_keys=tuple(ApiKey.parse(entry) for _, entry in made)) as face:
        yield face, [key for key, _ in made]


def sign_in(face: Face, key: str, following: str = "/"):
    face.client.cookies.clear()
    return post(face, "/sign-in", face.client.get("/sign-in").text, key=key, next=following)


# Who gets in.


def test_without_a_session_every_page_leads_to_the_door(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES)) as (face, _):
        for path in ("/", "/new", "/jobs/job_00000000000000000000000000", "/live?jobs=x", "/jobs/x/report", "/jobs/x/files/a"):
            answer = face.client.get(path, follow_redirects=False)
            assert (answer.status_code, urlsplit(answer.headers["location"]).path) == (303, "/sign-in"), path
        assert face.client.post("/new/plan", follow_redirects=False).status_code in (303, 400, 415)


def test_a_key_becomes_a_cookie_that_does_not_hold_it(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES)) as (face, (key,)):
        answer = sign_in(face, key, "/new?model=a")

        assert (answer.status_code, answer.headers["location"]) == (303, "/new?model=a")
        cookie = answer.headers["set-cookie"]
        assert key not in cookie
        assert {"HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"} <= {part.strip() for part in cookie.split(";")}
        assert "Secure" not in cookie
        assert face.client.get("/").status_code == 200


def test_behind_a_proxy_that_ends_tls_the_cookie_is_secure(face: Face):
    assert "Secure" in face.client.get("/", headers={"X-Forwarded-Proto": "https"}).headers["set-cookie"]


def test_a_wrong_key_is_told_on_the_page_and_counted(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES)) as (face, _):
        page = face.client.get("/sign-in").text
        first = last = post(face, "/sign-in", page, key="slim_wrong")
        for _ in range(300):  # one more is granted each second
            last = post(face, "/sign-in", page, key="slim_wrong")
            if last.status_code == 429:
                break

        assert (first.status_code, last.status_code) == (401, 429)
        assert "not one of this service" in unescape(first.text)
        assert last.headers["retry-after"]


def test_a_session_ends_with_its_key_at_once(face: Face):
    with face.work() as work:
        key, row = work.keys.create("ann")
    face.service.callers.look()
    assert sign_in(face, key).status_code == 303
    assert face.client.get("/", follow_redirects=False).status_code == 200

    with face.work() as work:
        assert work.keys.revoke(row.id)

    assert face.client.get("/", follow_redirects=False).headers["location"] == "/sign-in?next=%2F"


def test_a_cookie_that_was_changed_or_is_over_or_comes_from_elsewhere_opens_nothing():
    sessions = Sessions(b"a secret")
    session = sessions.begin("0" * 64)
    sealed = sessions.seal(session)

    assert sessions.open(sealed) == session
    assert sessions.open(sealed.replace("0" * 64, "1" * 64)) is None
    assert sessions.open(Sessions(b"another").seal(session)) is None
    assert sessions.open(sessions.seal(Session(1, session.nonce, session.sha256))) is None
    assert [sessions.open(text) for text in (None, "", "a.b.c.d", sealed + "0", "\x00")] == [None] * 5


def test_the_cookie_opens_nothing_of_version_1(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES)) as (face, (key,)):
        sign_in(face, key)

        assert face.client.get("/").status_code == 200
        assert face.client.get("/v1/jobs").json()["code"] == "missing_api_key"
        assert face.client.post("/v1/jobs", json=face.body()).json()["code"] == "missing_api_key"


def test_signing_out_takes_the_cookie_away(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES)) as (face, (key,)):
        sign_in(face, key)
        assert post(face, "/sign-out", face.client.get("/").text).headers["location"] == "/sign-in"

        assert COOKIE not in face.client.cookies


@pytest.mark.parametrize(
    "following", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/sign-out"]
)
def test_the_door_leads_to_pages_of_ours_alone(open_face: OpenFace, following: str):
    with locked(open_face, ("ann", SCOPES)) as (face, (key,)):
        assert sign_in(face, key, following).headers["location"] == "/"


def test_a_link_from_another_site_leads_to_the_door_without_ending_the_session(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES)) as (face, (key,)):
        sign_in(face, key)
        session = face.client.cookies.pop(COOKIE)
        door = face.client.get("/new", headers={"Sec-Fetch-Site": "cross-site"})
        assert '<a href="/new">go on to the page</a>' in door.text

        face.client.cookies.set(COOKIE, session)
        assert face.client.get("/new").url.path == "/new"


# What a form may do.


def test_a_form_needs_the_token_of_its_own_session(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES), ("bob", SCOPES)) as (face, (ann, bob)):
        sign_in(face, ann)
        anns = face.client.get("/new").text
        sign_in(face, bob)

        for fields in ({}, {"token": "0" * 64}, {"token": token_of(anns)}, {"token": "\udcff"[:0] + "é"}):
            answer = face.client.post("/new", data={**draft(face, key="k"), **fields})
            assert answer.status_code == 422, fields
            assert "page is too old" in answer.text
        assert face.rows()["jobs"] == 0


@pytest.mark.parametrize(
    "headers", [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://127.0.0.1:9"}, {"Origin": "http://localhost:8000"}]
)  # fmt: skip
def test_a_form_that_another_sites_page_sends_is_refused(face: Face, headers: dict[str, str]):
    page = face.client.get("/new").text
    fields = {"token": token_of(page), "key": key_of(page), **draft(face)}

    assert face.client.post("/new", data=fields, headers=headers).status_code == 400
    assert face.rows()["jobs"] == 0
    own = {"Sec-Fetch-Site": "same-origin", "Origin": LOOPBACK}
    assert face.client.post("/new", data=fields, headers=own, follow_redirects=False).status_code == 303


def test_a_form_sent_twice_makes_one_job(face: Face):
    page = face.client.get("/new").text
    first, second = (post(face, "/new", page, key=key_of(page), **draft(face)) for _ in range(2))

    assert first.status_code == second.status_code == 303
    assert first.headers["location"] == second.headers["location"]
    assert face.rows()["jobs"] == 1


def test_buttons_are_for_those_who_may_and_routes_refuse_the_others(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES), ("ann", ("jobs:read",))) as (face, (writer, reader)):
        sign_in(face, writer)
        page = face.client.get("/new").text
        path = post(face, "/new", page, key=key_of(page), **draft(face)).headers["location"]
        assert "Cancel the job" in face.client.get(path).text
        sign_in(face, reader)
        shown = face.client.get(path).text

        assert re.findall(r'<form method="post" action="([^"]+)"', shown) == ["/sign-out"]
        assert "New job" not in shown
        for action in ("cancel", "retry", "delete"):
            assert post(face, f"{path}/{action}", shown, key="k").status_code == 403, action
        assert post(face, "/new", shown, key="k", **draft(face)).status_code == 403
        assert face.client.get("/new").status_code == 403
        assert face.client.get(f"{path}/report").status_code == 403
        assert face.client.get(f"{path}/files/a").status_code == 403


def test_another_callers_job_is_not_there(open_face: OpenFace):
    with locked(open_face, ("ann", SCOPES), ("bob", SCOPES)) as (face, (ann, bob)):
        sign_in(face, ann)
        page = face.client.get("/new").text
        path = post(face, "/new", page, key=key_of(page), **draft(face)).headers["location"]
        sign_in(face, bob)
        page = face.client.get("/").text

        assert path not in page
        for answer in (
            face.client.get(path), face.client.get(f"{path}/live"), face.client.get(f"{path}/report"),
            face.client.get(f"{path}/files/a"),
            post(face, f"{path}/cancel", page), post(face, f"{path}/retry", page, key="k"), post(face, f"{path}/delete", page),
        ):  # fmt: skip
            assert answer.status_code == 404
        with face.client.stream("GET", f"/live?jobs={path.rpartition('/')[2]}") as answer:
            assert "event: pieces" not in answer.read().decode()


def test_a_job_is_cancelled_retried_and_deleted(face: Face):
    path = f"/jobs/{face.post_job()['id']}"
    page = face.client.get(path).text
    assert post(face, f"{path}/cancel", page).headers["location"] == path
    page = face.client.get(path).text
    again = post(face, f"{path}/retry", page, key=key_of(page)).headers["location"]
    assert again == post(face, f"{path}/retry", page, key=key_of(page)).headers["location"] != path

    assert post(face, f"{again}/delete", page).status_code == 409
    assert post(face, f"{path}/delete", page).headers["location"] == "/"
    assert face.client.get(path).status_code == 404


# What strangers wrote.


def test_what_strangers_wrote_is_text(face: Face):
    folder = write_mixtral(face.roots / "<script>alert(1)<")
    job = face.post_job(model=f"file://{folder}", labels={"who": SCRIPT})
    claim = face.claim(job["id"])
    with face.work() as work:
        work.attempts.warn(claim, SCRIPT, SCRIPT)
        work.attempts.advance(claim, {"fraction": 0.5, "block": 1, "blocks": 2, "message": SCRIPT, "eta_at": None})

    pages = [
        face.client.get(path)
        for path in ("/", f"/jobs/{job['id']}", f"/new?model={SCRIPT}&steps={SCRIPT}&recipe=steps", f"/?model={SCRIPT}")
    ]
    page = face.client.get("/new").text
    pages += [post(face, "/new/plan", page, model=SCRIPT), post(face, "/new", page, key="k", **draft(face, labels=SCRIPT))]
    pages += [
        face.client.get(f"/jobs/{SCRIPT}", headers=HTML),
        face.client.get(f"/nothing{SCRIPT}", headers=HTML),
        face.client.get(f"/?status={SCRIPT}"),
    ]

    assert all(answer.headers["content-type"].startswith("text/html") for answer in pages)
    assert [answer.request.url for answer in pages if "<script>alert" in answer.text] == []
    assert "&lt;script&gt;alert(1)" in pages[1].text


def test_pages_may_do_nothing_but_what_ours_do(face: Face):
    answers = [face.client.get(path, headers=HTML) for path in ("/", "/new", "/nothing", "/jobs/x", "/assets/dashboard.js")]

    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "style=" not in answer.text
    assert "content-security-policy" not in face.client.get("/v1/jobs").headers


# What pages say.


def test_a_lost_browser_gets_a_page_and_a_lost_program_a_problem(face: Face):
    assert face.client.get("/nothing", headers=HTML).headers["content-type"].startswith("text/html")
    assert face.client.get("/nothing").headers["content-type"] == "application/problem+json"
    assert face.client.get("/v1/nothing", headers=HTML).headers["content-type"] == "application/problem+json"
    assert face.client.get("/assets/../app.py").status_code == 404
    assert face.client.get("/assets/base.html").status_code == 404


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_list_goes_through_all_jobs_by_its_cursor(open_face: OpenFace, database_of: Databases, kind: str):
    with open_face(database_url=database_of[kind]) as face:
        plan = {"bytes_before": 3_729_664, "bytes_after": 2**40}
        fixed = {"owner": "anonymous", "model": "m/m", "request": {}, "resolved": {}, "spec_hash": "0", "plan": plan}
        with face.work() as work:
            ids = [work.jobs.add(Job(**fixed, labels={"n": str(number % 2)})).job.id for number in range(27)]
        first = face.client.get("/").text
        further = re.search(r'href="(/\?after=[^"]+)" rel="next"', first)
        assert further is not None
        second = face.client.get(unescape(further[1])).text

        shown = [re.findall(r'<tr data-job="(job_\w+)"', page) for page in (first, second)]
        assert [len(page) for page in shown] == [25, 2]
        assert shown[0] + shown[1] == ids[::-1]
        assert 'rel="next"' not in second
        assert re.search(r"3\.73 MB.*1\.10 TB", first)
        assert len(re.findall("<tr data-job", face.client.get("/?label=n%3D0").text)) == 14
        assert "<tr data-job" not in face.client.get("/?status=running").text
        assert face.client.get("/?after=job_x").status_code == 400
        assert face.client.get("/?status=odd").status_code == 422


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_row_shows_what_the_plan_says_and_then_what_came_out(
    open_face: OpenFace, database_of: Databases, kind: str, tmp_path: Path
):
    with open_face(database_url=database_of[kind]) as face:
        job = face.post_job()
        with reading(face.service.open_reader) as work:
            (row,) = work.jobs.overview("anonymous").rows
            assert (row.bytes_before, row.bytes_after, row.is_planned) == (
                job["plan"]["bytes_before"],
                job["plan"]["bytes_after"],
                True,
            )
        face.succeed(job["id"], {"a": b"12345"}, tmp_path / "made")
        with reading(face.service.open_reader) as work:
            (row,) = work.jobs.glance("anonymous", [job["id"]])
            assert (row.bytes_after, row.retention, row.is_planned) == (5, 0.9, False)


def test_a_finished_jobs_page_has_its_files_which_are_served_to_the_session(open_face: OpenFace, tmp_path: Path):
    with locked(open_face, ("ann", SCOPES)) as (face, (key,)):
        sign_in(face, key)
        page = face.client.get("/new").text
        path = post(face, "/new", page, key=key_of(page), **draft(face)).headers["location"]
        face.succeed(path.rpartition("/")[2], {"sub/ä b.txt": b"hello"}, tmp_path / "made")
        shown = face.client.get(path).text
        link = re.search(r'href="([^"]+/files/[^"]+)"', shown)

        assert link is not None
        assert "90.0 %" in shown
        answer = face.client.get(link[1], headers={"Range": "bytes=1-3"})
        assert (answer.status_code, answer.content) == (206, b"ell")
        assert face.client.get(f"{path}/report", headers=HTML).status_code == 200


def test_a_fragment_says_what_would_happen_and_why_not(face: Face):
    page = face.client.get("/new").text
    fits = post(face, "/new/plan", page, **draft(face)).text
    small = post(face, "/new/plan", page, model=face.model, target_memory="100KB").text
    open_question = post(face, "/new/plan", page, model=face.model).text
    broken = post(face, "/new/plan", page, **draft(face, steps="[{]", labels="a")).text
    wrong = post(
        face, "/new/plan", page, **draft(face, steps='[{"step": "quantize", "scheme": "W9"}]', calibration_samples="0")
    ).text

    assert "It fits" in fits
    assert 'data-smallest="135072"' in small
    assert "target_unreachable" in small
    assert 'data-fault="target_memory"' in small
    assert "<svg" in small.partition("What could be chosen")[2]
    assert "Choose a target between" in open_question
    assert "the recipe is not JSON" in broken
    assert {'data-fault="steps"', 'data-fault="calibration_samples"'} <= set(re.findall(r'data-fault="\w+"', wrong))
    assert face.rows()["jobs"] == 0


def test_a_refused_form_comes_back_filled_in_with_the_faults_beside_its_fields(face: Face):
    page = face.client.get("/new").text
    answer = post(face, "/new", page, key=key_of(page), model=face.model, target_memory="100KB", labels="team=x")

    assert answer.status_code == 422
    assert re.search(r'id="fault-target_memory"[^>]*>[^<]*smallest possible is 135072', answer.text)
    assert 'value="100KB"' in answer.text
    assert "team=x" in answer.text
    assert key_of(answer.text) != key_of(page)


def test_a_form_says_the_same_as_a_body(face: Face):
    fields = {
        "model": "m/m", "revision": "main", "target_memory": "20GB", "recipe": "auto", "calibration_text": "words",
        "calibration_samples": "8", "evaluation_source": "file:///a", "benchmarks": "arc_easy, piqa", "speed": "on",
        "min_retention": "0.9",
        "labels": "a=b\nc = d=e",
        "context_tokens": "4096", "evaluation_text": "", "steps": "not read",
    }  # fmt: skip

    assert body_of(fields) == {
        "model": "m/m", "revision": "main", "target_memory": "20GB",
        "calibration": {"source": {"inline": ["words"]}, "samples": 8},
        "evaluation": {"perplexity": {"source": "file:///a"}, "benchmarks": ["arc_easy", "piqa"], "speed": True},
        "constraints": {"min_retention": 0.9}, "labels": {"a": "b", "c": "d=e"}, "serving": {"context_tokens": 4096},
    }  # fmt: skip
    assert body_of({"model": "m", "target_memory": "20,000"})["target_memory"] == 20_000


def test_a_stream_tells_the_present_then_every_change_and_then_the_end(face: Face, tmp_path: Path):
    job_id = face.post_job()["id"]
    seen: list[dict[str, dict[str, str]]] = []
    with face.client.stream("GET", f"/jobs/{job_id}/live") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            name = line.removeprefix("event: ") if line.startswith("event: ") else name
            if name == "pieces" and line.startswith("data: "):
                seen.append(json.loads(line.removeprefix("data: ")))
                if len(seen) == 1:
                    face.succeed(job_id, {"a": b"1"}, tmp_path / "made")

    assert name == "end"
    assert "queued" in seen[0]["pieces"]["status"]
    assert "succeeded" in seen[-1]["pieces"]["status"]
    assert "job.succeeded" in seen[-1]["pieces"]["events"]
    assert face.service.streams.count == 0
    assert LOOK_EVERY_S <= 1.0


def test_the_dashboard_is_no_part_of_the_published_document(face: Face):
    paths = face.client.get("/openapi.json").json()["paths"]

    assert [path for path in paths if not path.startswith("/v1") and path not in ("/livez", "/readyz", "/metrics")] == []


def test_calls_of_the_dashboard_are_counted_by_route_and_against_the_limit(open_face: OpenFace):
    with open_face(rate_limit=3) as face:
        answers = [face.client.get("/") for _ in range(5)]
        assert answers[0].headers["ratelimit"].startswith('"default";r=2')
        assert answers[-1].status_code == 429
        assert "Too many requests" in answers[-1].text
        metrics = face.service.metrics.as_text().decode()
    assert 'slimtrim_http_request_seconds_count{method="GET",route="/",status="200"}' in metrics


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (19_912_345_678, "19.9 GB"),
        (None, "–"),
    ],
)
def test_a_size_has_three_digits_and_decimal_units(count: int | None, said: str):
    assert size(count) == said


def test_the_script_and_the_style_ask_nobody_else():
    folder = Path(__file__).parents[2] / "api" / "dashboard"
    for file in [*folder.rglob("*.css"), *folder.rglob("*.js")]:
        assert re.findall(r"[\w:]*//[\w.]+|url\(|import ", file.read_text()) == [], file
    for file in folder.rglob("*.html"):
        assert re.findall(r"""(?:src|href|action)=["'](?!/|\{\{|#|data:|["'])[^"']*""", file.read_text()) == [], file
