"""Images that stand in for those of docker-compose.yml where no registry can be reached.

``python -m tests.end_to_end.stand_ins BASE`` makes them from a Debian image: PostgreSQL and Redis are Debian's packages,
SeaweedFS is the wheel of ``requirements-servers.txt``. Each gets the very name that the compose file asks for, and
understands as much of the real image's environment as the compose file uses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
_POSTGRES = r"""
FROM {base}
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql util-linux \
    && rm -rf /var/lib/apt/lists/* && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ || true
RUN printf '%s\n' '#!/bin/sh' 'set -eu' 'data=/var/lib/postgresql/data' 'chown postgres $data' \
    'as="setpriv --reuid=postgres --regid=postgres --clear-groups"' \
    'if [ ! -f $data/PG_VERSION ]; then' \
    '  echo "$POSTGRES_PASSWORD" > /tmp/pw && chown postgres /tmp/pw' \
    '  $as initdb -D $data -U $POSTGRES_USER --pwfile=/tmp/pw -A scram-sha-256 -E UTF8' \
    '  echo "host all all all scram-sha-256" >> $data/pg_hba.conf' \
    '  echo "CREATE DATABASE $POSTGRES_DB" | $as postgres --single -D $data template1 || true' \
    'fi' \
    'exec $as postgres -D $data -c listen_addresses="*" -c unix_socket_directories=/tmp' > /entry.sh
CMD ["sh", "/entry.sh"]
"""
_REDIS = r"""
FROM {base}
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /data
"""
_SEAWEEDFS = r"""
FROM {base}
ARG PIP_CERT
RUN printf '%s\n' {requirements} > /requirements-servers.txt
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /weed \
    && /weed/bin/pip install --no-cache-dir --require-hashes -r /requirements-servers.txt && ln -s /weed/bin/weed /usr/bin/weed
"""
_FILES = {"postgres": _POSTGRES, "redis": _REDIS, "s3": _SEAWEEDFS}


def main(base: str) -> int:
    """Build every image that the compose file names and that is not ours."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    arguments = [f"--build-arg={name}={value}" for name, value in os.environ.items() if name in ("PIP_CERT", "PIP_INDEX_URL")]
    for service, text in _FILES.items():
        command = ["docker", "build", "--network=host", "-t", services[service]["image"], *arguments, "-"]  # without a context
        text = text.replace("{base}", base).replace("{requirements}", _quoted(ROOT / "requirements-servers.txt"))
        subprocess.run(command, input=text.encode(), check=True, env={**os.environ, "DOCKER_BUILDKIT": "0"})
    return 0


def _quoted(file: Path) -> str:
    return " ".join(f"'{line}'" for line in file.read_text().splitlines() if not line.startswith("#"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
