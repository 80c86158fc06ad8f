# Engine builds and GPU benchmarks with TensorRT proper.
# Build from the repository's root; see docker/README.md.
#
# 25.10: Ubuntu 24.04, Python 3.12, CUDA 13.0, TensorRT 10.13.
FROM nvcr.io/nvidia/tensorrt:25.10-py3

ENV ORT_DISABLE_TELEMETRY=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/venv/bin:$PATH

# Unpinned: the tag above fixes the Ubuntu release, and Ubuntu's index drops superseded versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 slimvit \
    && install --directory --owner=slimvit --group=slimvit /opt/venv /opt/slimvit
USER 10001
WORKDIR /opt/slimvit

COPY --chown=slimvit:slimvit . .
# No extra `trt`: the environment sees the base image's tensorrt, which matches its CUDA libraries. The last line fails
# the build, rather than the first benchmark, should the base image not hold what slimvit needs.
RUN python3 -m venv --system-site-packages /opt/venv \
    && pip install --no-cache-dir --editable '.[dev]' \
    && python -c "import tensorrt; assert tuple(map(int, tensorrt.__version__.split('.')[:2])) >= (10, 12), tensorrt.__version__"

CMD ["pytest", "-m", "gpu"]
