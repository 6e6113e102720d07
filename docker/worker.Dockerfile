# A worker, with torch. Build from the repository's root:
#   docker build -f docker/worker.Dockerfile -t slimtrim-worker:0.1.0-cpu .
#   docker build -f docker/worker.Dockerfile --build-arg FLAVOUR=cuda -t slimtrim-worker:0.1.0-cuda .
# FLAVOUR picks torch's build: cpu from PyTorch's own index, cuda from the Python Package Index, which serves it by default and
# brings the CUDA libraries along; the host needs a driver and the NVIDIA container toolkit. TORCH_INDEX names another index.
ARG BASE=python:3.12.11-slim-bookworm

FROM ${BASE} AS packages
ARG FLAVOUR=cpu
ARG TORCH_INDEX
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
COPY constraints.txt requirements.txt /build/
RUN case "$FLAVOUR" in \
        cpu) index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" ;; \
        cuda) index="$TORCH_INDEX" ;; \
        *) echo "FLAVOUR is cpu or cuda, not $FLAVOUR" >&2; exit 1 ;; \
    esac \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir ${index:+--extra-index-url "$index"} "$(grep '^torch==' /build/constraints.txt)" \
    && /opt/venv/bin/pip install --no-cache-dir -r /build/requirements.txt -c /build/constraints.txt \
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
COPY worker worker
RUN /opt/venv/bin/python -m compileall -q /app
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 SLIMTRIM_DATA_DIR=/data
USER 10001:10001
# One check costs a second of one core, so it is seldom.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["python", "-m", "jobs.alive", "worker"]
CMD ["python", "-m", "worker"]
