# The command `camera` with the versions of constraints.txt. From the root of the repository:
#
#   docker build -t camera .
#   mkdir -p outputs cache
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/outputs:/runs/outputs" \
#     -v "$PWD/cache:/cache" camera run method=camera_p sparsity=0.4
#
# What is written belongs to the user who runs it; /cache keeps models and data of the hub between
# runs. With GPUs: --gpus all; PyTorch's wheel brings its CUDA libraries. Several processes that
# share memory (a data loader, torchrun) need --ipc=host.
FROM python:3.12-slim-bookworm

# Triton, which fuses operators on a GPU, calls a C compiler
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The sources are mounted, not copied: only what is installed becomes part of the image
RUN --mount=type=bind,target=/src,rw --mount=type=cache,target=/root/.cache/pip \
    pip install --root-user-action=ignore -c /src/constraints.txt '/src[experiments,joblib]'

# Any --user may write here; one without an entry in /etc/passwd still needs a name and a home
ENV HOME=/cache HF_HOME=/cache/huggingface MPLCONFIGDIR=/cache/matplotlib USER=camera
RUN useradd --uid 1000 --home-dir /cache --no-create-home camera \
    && mkdir --mode=1777 /cache /runs /runs/outputs
USER camera
WORKDIR /runs
ENTRYPOINT ["camera"]
CMD ["--help"]
