# API, maintenance and migration: everything that needs no torch. Build from the repository's root:
#   docker build -f docker/api.Dockerfile -t slimtrim-api:0.1.0 .
# BASE may be any Debian-like image with Python 3.11, 3.12 or 3.13 and its venv module. pip's own settings may be given as
# build arguments (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_CERT); none of them stays in the image.
ARG BASE=python:3.12.11-slim-bookworm

FROM ${BASE} AS packages
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
COPY constraints.txt docker/requirements-api.txt /build/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -r /build/requirements-api.txt -c /build/constraints.txt \
    && /opt/venv/bin/pip uninstall --yes pip

FROM ${BASE}
RUN groupadd --gid 10001 slimtrim \
    && useradd --uid 10001 --gid 10001 --home-dir /data --shell /usr/sbin/nologin slimtrim \
    && install -d -m 0700 -o slimtrim -g slimtrim /data
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY pyproject.toml ./
COPY compression compression
COPY jobs jobs
COPY api api
COPY worker worker
# The root file system may be mounted read-only, so bytecode is made now.
RUN /opt/venv/bin/python -m compileall -q /app
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    SLIMTRIM_DATA_DIR=/data SLIMTRIM_PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["python", "-m", "api"]
