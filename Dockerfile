# syntax=docker/dockerfile:1
# Tinytron for NVIDIA GPUs (driver 580 or newer, for CUDA 13), also usable without one:
#
#   docker build --tag tinytron .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/runs" tinytron quickstart
#
# --ipc host: data loaders and NCCL need more shared memory than the 64 MB that docker gives. The folder at /runs must be
# writable for user 10001, or give your own: --user "$(id -u):$(id -g)". torch's wheels bring the CUDA libraries along, so the
# small base image is enough; the compiler and Python's headers are for torch.compile and Triton.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The versions are those of the base image's release.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean && \
    apt-get update && \
    apt-get install --yes --no-install-recommends gcc g++ git libc6-dev python3 python3-dev python3-venv && \
    python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp/home \
    PYTHONUNBUFFERED=1

WORKDIR /opt/tinytron

# The dependencies first: this layer stays in the cache until pyproject.toml or constraints.txt change.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tinytron/__init__.py tinytron/
COPY tinytron/observe/page tinytron/observe/page
RUN --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --constraint constraints.txt ".[all]"

COPY tinytron tinytron
RUN --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --no-deps --force-reinstall . && \
    useradd --uid 10001 --no-create-home --shell /bin/bash tinytron && \
    install --directory --mode=1777 /tmp/home && \
    install --directory --owner=tinytron /runs

# A number, because Kubernetes' runAsNonRoot cannot look up a name.
USER 10001
WORKDIR /runs
ENTRYPOINT ["tinytron"]
CMD ["--help"]
