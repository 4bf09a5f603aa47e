# The command `camera` with the versions of constraints.txt:
#
#   docker build -t camera .
#   docker run --rm -v "$PWD/outputs:/runs/outputs" camera run method=camera_p sparsity=0.4
#
# With GPUs: --gpus all; PyTorch's wheel brings its CUDA libraries. A model of the hub is kept
# between runs with -v ~/.cache/huggingface:/root/.cache/huggingface.
FROM python:3.12-slim

WORKDIR /opt/camera
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[experiments,joblib]'

WORKDIR /runs
ENTRYPOINT ["camera"]
CMD ["--help"]
