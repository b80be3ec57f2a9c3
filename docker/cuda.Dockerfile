# jfog on NVIDIA GPUs. CUDA's libraries and NCCL come with jax[cuda13]; the machine
# has the driver and the NVIDIA Container Toolkit:
#   docker build -f docker/cuda.Dockerfile -t jfog-cuda .
#   docker run --rm --gpus all --shm-size 1g jfog-cuda
FROM python:3.13-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir '/src[cuda13,examples]'
RUN useradd --create-home jfog && install -d -o jfog /work
USER jfog
WORKDIR /work
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["jfog", "doctor"]
