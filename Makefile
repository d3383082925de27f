# make demo    the whole path, on this machine, from nothing
# make test    the whole suite, against a real Postgres and a real Valkey
# make chaos   jobs while workers, the broker, the database and the disk fail
.PHONY: setup demo test chaos check nightly catalog openapi clean

PYTHON ?= python3
TORCH_INSTALL_ARGS ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH_INSTALL_ARGS)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[service,worker,local,dev]'
	touch $@

demo: setup
	$(BIN)/unlearn demo

test: setup
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

chaos: setup
	$(BIN)/python -m tests.chaos.chaos

nightly: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/python -m tests.chaos.chaos --jobs 60

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd migrations/versions && sha256sum --check --quiet ../versions.sha256
	$(BIN)/python -m worker.registry --check service/catalog.json
	$(BIN)/python -m service.openapi --check service/openapi.json

catalog: setup
	$(BIN)/python -m worker.registry > service/catalog.json.tmp && mv service/catalog.json.tmp service/catalog.json

openapi: setup
	$(BIN)/python -m service.openapi > service/openapi.json.tmp && mv service/openapi.json.tmp service/openapi.json

clean:
	rm -rf .unlearn .mypy_cache .ruff_cache .pytest_cache build *.egg-info
