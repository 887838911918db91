# hvdqn with torch, Open MPI and a Horovod built against both: NCCL + MPI + Gloo on GPUs, MPI + Gloo on CPUs.
#
#   docker build -t hvdqn .                                                       GPU: CUDA 13, Ubuntu 24.04
#   docker build -t hvdqn-cpu --build-arg BASE_IMAGE=debian:bookworm-slim \
#       --build-arg RUNTIME_IMAGE=debian:bookworm-slim .                          CPU
#
#   docker run --rm hvdqn                                                         print the help
#   docker run --rm --gpus all --shm-size 1g -v "$PWD/runs:/workspace/runs" --user "$(id -u):$(id -g)" \
#       hvdqn horovodrun -np 8 python -m hvdqn.train --preset atari --env ALE/Breakout-v5
#
# --shm-size   Ranks on one host exchange data through /dev/shm (Open MPI about 4 MB per rank, NCCL up to 30 MB). The
#              default of 64 MB is enough for a few ranks; more fail with a bus error. --ipc host works too.
# SYS_PTRACE   Open MPI can copy large messages directly between the memories of two ranks, which a container's default
#              seccomp profile may forbid. So it is off, see OMPI_MCA_btl_vader_... below. To turn it on, use
#              --cap-add SYS_PTRACE -e OMPI_MCA_btl_vader_single_copy_mechanism=cma.
# docker stop  sends SIGUSR2. mpirun, and horovodrun over MPI, pass it to every rank: they write a checkpoint and exit
#              with 75. Give them time: docker stop -t 120.
#
# Build arguments. The image is built in BASE_IMAGE and runs in RUNTIME_IMAGE. Both must be of the same release of
# Debian or Ubuntu, since the environment that is copied from one to the other uses the system's Python. For a GPU image
# BASE_IMAGE needs nvcc, of the same CUDA major version as torch (torch 2.13: CUDA 13). torch contains its own CUDA
# libraries, so nvidia/cuda:13.0.2-base-ubuntu24.04 is enough as RUNTIME_IMAGE, unless you add other programs that need
# those of the system.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG RUNTIME_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH_VERSION=2.13.0
# Instructions that every CPU of the last ten years has. Horovod's default is those of the machine that builds it.
ARG HOROVOD_BUILD_ARCH_FLAGS="-mavx -mf16c -mfma"
# GPUs that CUDA 13 supports: 75 is Turing, 80 and 86 Ampere, 89 Ada, 90 Hopper, 100 and 120 Blackwell.
ARG HOROVOD_BUILD_CUDA_CC_LIST=75,80,86,89,90,100,120
ENV HVDQN_VENV=/opt/hvdqn

# Install the dependencies and Horovod with only the files that this needs. The layer is then reused when other files
# of hvdqn change.
WORKDIR /src
COPY pyproject.toml ./
COPY launch/setup.sh launch/install_horovod.sh launch/
COPY hvdqn/launchers/__init__.py hvdqn/launchers/horovod_build.py hvdqn/launchers/horovod_check.py hvdqn/launchers/
RUN --mount=type=cache,target=/root/.cache \
    touch README.md LICENSE hvdqn/__init__.py \
    && if command -v nvcc >/dev/null; then device=gpu; else device=cpu; unset HOROVOD_BUILD_CUDA_CC_LIST; fi \
    && HVDQN_TORCH="${TORCH_VERSION}" HVDQN_HOROVOD="$device" launch/setup.sh \
    && "$HVDQN_VENV/bin/python" -m pip uninstall --yes --quiet hvdqn cmake ninja

COPY README.md LICENSE ./
COPY launch launch
COPY hvdqn hvdqn
RUN "$HVDQN_VENV/bin/python" -m pip install --no-cache-dir --no-deps --no-build-isolation --no-index . \
    && find "$HVDQN_VENV" -name '*.a' -delete \
    && rm -rf "$HVDQN_VENV"/lib/python3*/site-packages/torch/test \
    && find "$HVDQN_VENV" -path '*/horovod/*.so' -exec strip --strip-unneeded {} + \
    && rm -rf "$HVDQN_VENV"/.hvdqn-* "$HVDQN_VENV"/*.log

FROM ${RUNTIME_IMAGE}
ARG RUNTIME_IMAGE
ARG TORCH_VERSION=2.13.0
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="hvdqn" \
    org.opencontainers.image.description="Data-parallel DQN on Horovod, MPI and torchrun" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${RUNTIME_IMAGE}" \
    hvdqn.torch="${TORCH_VERSION}"

# tini is process 1: it passes signals on and reaps orphans. ssh (without sshd): mpirun needs it even on a single host.
# sh is bash: horovodrun runs `sh -c "mpirun ..."`, and bash replaces itself with mpirun. dash would keep running, and
# the signal for the ranks would end it.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        libpython3-stdlib openssh-client python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log \
    && ln -sf bash /bin/sh \
    && useradd --uid 10001 --create-home --shell /bin/bash hvdqn \
    && install --directory --mode 1777 /workspace

COPY --from=build /opt/hvdqn /opt/hvdqn
ENV PATH=/opt/hvdqn/bin:$PATH \
    OMPI_MCA_btl_vader_single_copy_mechanism=none

# Fail here with a clear message instead of later with a traceback.
RUN python -c "import torch" \
    || { echo "RUNTIME_IMAGE=${RUNTIME_IMAGE} is not of the same release as BASE_IMAGE: Python differs" >&2; exit 1; }

USER hvdqn
# Writable for any user id (--user), also as the home directory that horovodrun writes to.
WORKDIR /workspace
ENV HOME=/workspace
STOPSIGNAL SIGUSR2
ENTRYPOINT ["tini", "--"]
CMD ["hvdqn", "--help"]
