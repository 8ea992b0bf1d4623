# Every target sets up .venv by itself when it is missing or older than what it was made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pinned versions need Python 3.11; on 3.10 the ranges of pyproject.toml hold.
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
# Python compiles a module when it is first imported. Most of what is installed is never imported.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile $(PINS)
# Where the environment sets it to 1, each process would compile all that it imports, for 9 seconds. Empty: not set.
export PYTHONDONTWRITEBYTECODE :=
# Three processes of one thread each, for two cores: some tests wait. Files stay whole, for what they load once.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 3 --dist loadfile
# A live vLLM for `make test-servers`, serving the bundled SmolLM2.
VLLM_URL ?= http://127.0.0.1:8811/v1

.PHONY: help demo test fast fix lint docs test-servers bench
.DEFAULT_GOAL := help
# Two targets that install into one environment must take turns.
.NOTPARALLEL:

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

demo: $(VENV)/.runtime ## Answer nine sample questions with the bundled models
	$(BIN)/specrag models fetch
	$(BIN)/specrag demo

test: lint $(VENV)/.dev ## Lint, check types, run all tests (CI runs this)
	$(BIN)/specrag models fetch minilm smollm2 mpnet
	$(PYTEST)

fast: lint $(VENV)/.dev ## Lint, check types, run the quick tests
	$(BIN)/specrag models fetch
	$(PYTEST) -m "not slow"

fix: $(VENV)/.dev ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.dev ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPY_NUM_WORKERS=2 $(BIN)/mypy

docs: $(VENV)/.docs ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-servers: $(VENV)/.dev ## Run the server tests against a live vLLM at VLLM_URL
	$(BIN)/specrag models fetch
	$(PYTEST) tests/test_openai_lm.py tests/test_docs.py -k vllm --vllm-url $(VLLM_URL)

# VERIFIER: a model folder, e.g. Qwen2.5-Coder-1.5B-Instruct.
bench: $(VENV)/.dev ## Measure (minutes to hours); give VERIFIER=path/to/model
	$(BIN)/specrag models fetch
	$(BIN)/python benchmarks/perspectives.py
	$(BIN)/python benchmarks/verification.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/decoder.py
	$(BIN)/python benchmarks/rapid_decoding.py --lengths 4096
	$(BIN)/python benchmarks/rapid_sessions.py
	$(BIN)/python benchmarks/speculative_rag.py --verifier $(or $(VERIFIER),$(error give VERIFIER=path/to/model))

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[local,documents]'
	touch $@

# It holds what .runtime holds.
$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $(VENV)/.runtime $@

# Without torch: the reference is made from the source, not from imports.
$(VENV)/.docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[docs]'
	touch $@
