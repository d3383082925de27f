# The control plane: API, migrations, sweep. No torch.
#   docker build -f docker/service.Dockerfile -t unlearn-service .
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Named volumes take the owner of the folder that they cover, so the folder exists in the image and is the user's.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin unlearn \
    && install -d -o unlearn -g unlearn /var/lib/unlearn/storage /var/lib/unlearn/models

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY worker worker
COPY migrations migrations
RUN pip install -c constraints.txt '.[service,s3]'

USER unlearn
WORKDIR /var/lib/unlearn
ENV API_HOST=0.0.0.0 API_PORT=8000 SWEEP_METRICS_HOST=0.0.0.0 STORAGE_URL=/var/lib/unlearn/storage MODELS_ROOT=/var/lib/unlearn/models
EXPOSE 8000 9101
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:%s/livez' % os.environ['API_PORT'], timeout=2)"]
# The others run as: unlearn migrate | python -m service.sweep
CMD ["unlearn", "api"]
