# evenstep with its command line.
#
#   docker build -t evenstep .                                     CPU
#   docker build -t evenstep --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .    CUDA
#   docker run -v "$PWD":/work evenstep pretrain --data.source 'text:notes/**/*.md'
#   docker run --gpus all --ipc host -v "$PWD":/work evenstep doctor
FROM python:3.11-slim-bookworm AS build

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# A compiler for the CPU kernels, in this stage only
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/evenstep
ENV PATH=/opt/evenstep/bin:$PATH
RUN pip install --no-cache-dir "$TORCH" --index-url "$TORCH_INDEX"
COPY . /source
RUN pip install --no-cache-dir "/source[train,hf]"

FROM python:3.11-slim-bookworm

# Triton compiles a launcher of its kernels at run time, which needs a C compiler; without a GPU nothing uses it
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/evenstep /opt/evenstep
ENV PATH=/opt/evenstep/bin:$PATH
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /work
ENTRYPOINT ["evenstep"]
CMD ["--help"]
