"""A step of a build: compress a model, and fail the build where too much of it is lost.

    python examples/pipeline.py REQUEST.json FOLDER --floor 0.92 [--build ID]

The service comes from SLIMTRIM_URL and SLIMTRIM_API_KEY. The same build and request give the same job, so a build that is
started again goes on waiting instead of paying twice. The exit code is 0, or that of the error, as the command ``slimtrim`` has
them (5: below the floor).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from slimtrim_client import Client, SlimtrimError, require_success


def main(arguments: list[str]) -> int:
    """Run the step and return the exit code."""
    parser = argparse.ArgumentParser(description="Compress a model; fail the build where too much of it is lost.")
    parser.add_argument("request", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--floor", type=float, required=True, help="retention below which the build fails, 0 to 1")
    parser.add_argument("--build", default="local", help="the build's own id")
    options = parser.parse_args(arguments)
    try:
        build(options.request, options.folder, options.floor, options.build)
    except SlimtrimError as error:
        print(f"the build fails: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def build(request: Path, folder: Path, floor: float, build_id: str) -> None:
    """Plan, submit, wait, judge, download; raise what is wrong."""
    text = request.read_bytes()
    # The floor is held here and not by "constraints", so that a job below it still has its report, which says what was lost.
    body, key = json.loads(text), f"{build_id}-{hashlib.sha256(text).hexdigest()[:16]}"
    with Client() as client:
        plan = client.plan(body)
        print(f"{plan['bytes_before']:,} bytes will be {plan['bytes_after']:,}")
        job = client.submit(body, idempotency_key=key)
        print(f"job {job['id']}")
        job = client.wait(job["id"])
        if job["status"] == "succeeded":
            for line in client.report(job["id"])["lost"]:
                print(f"- {line}")
        require_success(job, min_retention=floor)
        got = client.download(job["id"], folder)
    print(f"{len(got.files)} files, {got.bytes:,} bytes, every sha256 checked: {got.folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
