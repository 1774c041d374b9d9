# `make demo` and `make test` are all that is needed from a fresh clone: they make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pytest-xdist workers; each test process computes with one thread
WORKERS ?= 2

.PHONY: demo test test-all test-gpu conformance clients specification lint types budget readme clean

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.run

demo: $(VENV)/.run  ## the main job on the embedded model and data
	rm -rf runs/demo
	$(BIN)/tunefork demo --out runs/demo

test: $(VENV)/.dev  ## under 12 minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-all: $(VENV)/.dev  ## everything, the long ones too
	$(BIN)/python -m pytest -n $(WORKERS)

test-gpu: $(VENV)/.dev  ## on a CUDA device: the engine's bits, and the battery's runs
	TUNEFORK_TEST_GPU=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not slow' tests/gpu tests/battery

conformance: $(VENV)/.dev  ## openai-python's own tests against the server; skipped where their source cannot be had
	$(BIN)/python -m tests.server.conformance

clients: $(VENV)/.dev  ## the promise under openai-python 1, 2 and 3 and npm's openai, fetched for it
	$(BIN)/python -m pytest -n0 -v -rs -m slow tests/server/test_clients.py

specification: $(VENV)/.dev  ## schemathesis over OpenAI's openapi.yaml: make specification SPEC=openapi.yaml
	$(BIN)/python -m tests.server.specification $(SPEC)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

budget: $(VENV)/.dev  ## lines in src, a file and in all
	$(BIN)/python tests/budget.py

readme: $(VENV)/.dev  ## runs the README's commands
	$(BIN)/python tests/readme/run_readme.py

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
