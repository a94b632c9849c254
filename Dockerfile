# The trainer, its command line, and vLLM to sample with, on NVIDIA GPUs:
#
#   docker build --tag asyppo:0.1.0 .
#   docker run --gpus all --ipc host --volume "$PWD/runs:/srv/asyppo/runs" asyppo:0.1.0 asyppo train
#
# vLLM pins other versions of torch and transformers, so it has an environment of its own, /opt/vllm; a run takes it with
# --sampler vllm --vllm.python /opt/vllm/bin/python.
ARG CUDA=13.0.0

FROM python:3.12-slim AS wheel
RUN pip install --no-cache-dir build==1.6.1
COPY . /source
RUN python -m build --wheel --outdir /dist /source

FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04
# Triton compiles a launcher for each kernel, and pycosat is compiled where it is installed.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG VLLM=0.32.0
RUN python3 -m venv /opt/vllm && /opt/vllm/bin/pip install --no-cache-dir "vllm==${VLLM}"

COPY constraints.txt /tmp/
COPY --from=wheel /dist /tmp/dist
RUN python3 -m venv /opt/asyppo \
    && wheel=$(ls /tmp/dist/*.whl) \
    && /opt/asyppo/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt "${wheel}[train,tasks]" \
    && rm -rf /tmp/dist /tmp/constraints.txt

ENV PATH=/opt/asyppo/bin:${PATH} \
    HF_HOME=/srv/asyppo/huggingface \
    PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 asyppo && install --directory --owner asyppo /srv/asyppo
USER 10001
WORKDIR /srv/asyppo
CMD ["asyppo", "--help"]
