"""A whole job whose model and text come from a bucket and whose artifact goes into one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compression.errors import DiskFull
from jobs.attempts import Claim
from jobs.settings import Settings
from jobs.status import JobStatus
from jobs.storage import open_storage
from tests.servers import Bucket
from tests.worker.stand import OWNER, Stand, a_stand
from worker.maintenance import Maintenance
from worker.workspace import open_workspace


@pytest.fixture
def far_stand(tmp_path: Path, bucket: Bucket) -> Iterator[Stand]:
    settings = {
        "STORAGE_URL": bucket.settings["storage_url"], "S3_ENDPOINT_URL": bucket.endpoint, "MODEL_BUCKETS": bucket.name,
    }  # fmt: skip
    with a_stand(tmp_path, **settings) as stand:
        stand.settings = Settings(**{**stand.settings.model_dump(), "model_buckets": (bucket.name,)})
        yield stand


def request_of(bucket: Bucket, **members: Any) -> dict[str, Any]:
    below = f"s3://{bucket.name}/{bucket.prefix}"
    client = bucket.client()
    client.put_object(Bucket=bucket.name, Key=f"{bucket.prefix}/model/config.json", Body=b"{}")
    client.put_object(Bucket=bucket.name, Key=f"{bucket.prefix}/text.txt", Body=b"some words")
    return {
        "model": f"{below}/model",
        "recipe": {"steps": [{"step": "analyze"}]},
        "calibration": {"source": {"inline": [json.dumps({"blocks": 2})]}},
        "evaluation": {"perplexity": {"source": f"{below}/text.txt"}},
        **members,
    }


def test_a_job_goes_from_bucket_to_bucket(far_stand: Stand, bucket: Bucket):
    far_stand.start_worker()

    job = far_stand.wait_over(far_stand.post_request(request_of(bucket)))

    assert job.status is JobStatus.SUCCEEDED, far_stand.logs()
    manifest = far_stand.do(lambda work: work.jobs.manifest(OWNER, job.id))
    assert manifest is not None
    store = open_storage(far_stand.settings)
    for file in manifest["files"]:
        with store.open(f"{job.artifact_prefix}{file['path']}") as stream:
            assert hashlib.sha256(stream.read()).hexdigest() == file["sha256"]
    assert not list(far_stand.settings.work_folder.glob("*/*"))
    for secret in (bucket.secret_key, "X-Amz-Signature"):
        assert secret not in far_stand.logs()


def test_a_model_that_changed_since_the_plan_fails_the_job_once(far_stand: Stand, bucket: Bucket):
    far_stand.start_worker()

    job = far_stand.wait_over(far_stand.post_request(request_of(bucket), resolved={"revision": "0" * 64}))

    assert job.status is JobStatus.FAILED
    assert job.status_reason is not None
    assert job.status_reason["code"] == "download_failed"
    assert len(far_stand.attempts(job.id)) == 1


def test_cleaning_removes_what_no_job_shows(far_stand: Stand, bucket: Bucket, tmp_path: Path):
    store = open_storage(far_stand.settings)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(b"x")
    store.put_artifact("artifacts/job_00000000000000000000000000/a1/", tmp_path / "out")
    store.put_artifact("artifacts/not-ours/", tmp_path / "out")

    Maintenance(far_stand.settings).clean()

    assert store.list() == ["artifacts/not-ours/manifest.json", "artifacts/not-ours/x"]


def a_claim(model: str, artifact: int, source: int) -> Claim:
    plan = {"bytes_before": source, "bytes_after": artifact + 5, "components": {"kv_cache": 3, "overhead": 2}}
    facts: dict[str, Any] = {name: None for name in Claim.__dataclass_fields__}
    return Claim(**{**facts, "job_id": "job_1", "fence": 1, "request": {"model": model}, "plan": plan})


@pytest.mark.parametrize(
    ("model", "links", "elsewhere", "needed"),
    [
        ("file:///m", True, False, 100),
        ("s3://b/m", True, False, 1100),
        ("a/b", True, False, 1100),
        ("file:///m", False, False, 300),
        ("a/b", False, False, 1300),
        ("file:///m", False, True, 200),
    ],
)
def test_a_job_is_begun_only_when_everything_it_keeps_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, links: bool, elsewhere: bool, needed: int
):
    monkeypatch.setattr("jobs.storage.FolderStorage.links_from", lambda *_: links)
    monkeypatch.setattr("worker.workspace._is_on_disk_of", lambda *_: not elsewhere)
    free = {"bytes": needed + 7}
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free["bytes"]}))
    settings = Settings(data_dir=tmp_path, min_free_bytes=7)

    with open_workspace(settings, a_claim(model, 100, 1000)):
        pass
    free["bytes"] -= 1
    with pytest.raises(DiskFull, match=f"{needed} bytes"), open_workspace(settings, a_claim(model, 100, 1000)):
        pass


def test_what_is_free_in_a_bucket_is_nobodys_guess(tmp_path: Path, bucket: Bucket):
    settings = Settings(data_dir=tmp_path, min_free_bytes=1, **bucket.settings)

    assert open_storage(settings).free_bytes() is None
    with open_workspace(settings, a_claim("file:///m", 100, 1000)) as workspace:
        assert workspace.out.is_dir()
