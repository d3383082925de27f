# The data plane: torch, transformers, peft. No fastapi.
#   docker build -f docker/worker.Dockerfile -t unlearn-worker .
# torch's default wheel carries CUDA and runs on CPU too; TORCH_INSTALL_ARGS names another build (see docker/example.env).
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}
ARG TORCH_INSTALL_ARGS=torch==2.13.0

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Named volumes take the owner of the folder that they cover, so the folder exists in the image and is the user's.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin unlearn \
    && install -d -o unlearn -g unlearn /var/lib/unlearn/storage /var/lib/unlearn/models /var/lib/unlearn/scratch /var/lib/unlearn/hub

# Gigabytes, and rarely changed: a layer of its own, before the sources. Unquoted on purpose, it is a list of arguments.
RUN pip install ${TORCH_INSTALL_ARGS}

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY worker worker
COPY migrations migrations
RUN pip install -c constraints.txt '.[worker,s3]'

USER unlearn
WORKDIR /var/lib/unlearn
ENV STORAGE_URL=/var/lib/unlearn/storage MODELS_ROOT=/var/lib/unlearn/models WORKER_SCRATCH_DIR=/var/lib/unlearn/scratch \
    WORKER_METRICS_HOST=0.0.0.0 WORKER_METRICS_PORT=9100 HF_HOME=/var/lib/unlearn/hub TOKENIZERS_PARALLELISM=false
EXPOSE 9100
HEALTHCHECK --interval=15s --timeout=3s --start-period=20s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:%s/livez' % os.environ['WORKER_METRICS_PORT'], timeout=2)"]
CMD ["python", "-m", "worker.app"]
