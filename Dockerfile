# An image with the command tccd, for GPUs:
#
#   docker build --tag tccd .
#   docker run --rm --gpus all --shm-size 1g --volume "$PWD:/work" tccd tccd demo --quick
#   docker run --rm --gpus all --shm-size 1g --volume "$PWD:/work" tccd mpiexec -n 8 tccd distil --config CONFIG
#
# torch's wheel brings its own CUDA libraries; the base must fit the host's driver.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# The compiler is for the fused kernels, those in C and those by Triton, and for run.compile.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Add eval to score with Inception: --build-arg EXTRAS=mpi,diffusers,remote,wandb,eval
ARG EXTRAS=mpi,diffusers,remote,wandb
COPY . /build
RUN python3 -m venv /opt/tccd \
    && /opt/tccd/bin/python -m pip install --no-cache-dir --constraint /build/requirements.txt "/build[${EXTRAS}]" \
    && rm -rf /build
ENV PATH=/opt/tccd/bin:$PATH

# The user's number is that of the files it writes to a mounted folder: --build-arg UID=$(id -u)
ARG UID=1000
RUN useradd --create-home --non-unique --uid "${UID}" tccd && install --directory --owner tccd /work
USER tccd
WORKDIR /work
CMD ["tccd", "--help"]
