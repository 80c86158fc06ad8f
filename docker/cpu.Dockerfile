# Tests, export, ONNX Runtime and OpenVINO on a CPU; also builds TensorRT-for-RTX engines, which needs no GPU.
# Build from the repository's root; see docker/README.md.
FROM python:3.11.13-slim-bookworm

ENV ORT_DISABLE_TELEMETRY=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/venv/bin:$PATH

RUN useradd --create-home --uid 10001 slimvit \
    && install --directory --owner=slimvit --group=slimvit /opt/venv /opt/slimvit
USER 10001
WORKDIR /opt/slimvit

# PyTorch's own index serves wheels without CUDA, some gigabytes smaller than the default ones. It is asked for these
# two packages only, in a layer that a change of the source does not touch.
ARG TORCH=2.14.1
ARG TORCHVISION=0.29.1
RUN python -m venv /opt/venv \
    && pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        "torch==${TORCH}" "torchvision==${TORCHVISION}"

COPY --chown=slimvit:slimvit . .
RUN pip install --no-cache-dir --editable '.[dev,openvino,trt-rtx]'

CMD ["pytest"]
