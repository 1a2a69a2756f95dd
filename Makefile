# Two commands do everything on a fresh machine with Python and g++:  make demo   and   make test.
# They make a virtual environment of their own in .venv (VENV=… for another place) and install what they need there.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
SOURCES = $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: help demo test test-fast test-sanitize lint bench bench-cpu bench-generate bench-gpu gpu-check wheel clean install

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first: the build uses its headers, and a plain `torch` would bring gigabytes of CUDA packages.
$(STAMP): $(SOURCES) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" pybind11 ninja wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	@touch $@

install: $(STAMP)  ## virtual environment, build, editable install

demo: $(STAMP)  ## train a small GPT on Shakespeare for three minutes, then let it write
	$(BIN)/python -m gptfast.demo

test: $(STAMP) lint  ## the whole test suite
	$(BIN)/python -m pytest

test-fast: $(STAMP)  ## the tests that take under three seconds each
	$(BIN)/python -m pytest -m "not slow"

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)  ## every op beside eager PyTorch and torch's own functions: table, JSON, PNG
	$(BIN)/python -m gptfast bench

bench-cpu: $(STAMP)  ## the same with malloc as installed and tuned, and the training step of GPT-2 beside transformers
	$(BIN)/python -m gptfast bench --out runs/bench/installed
	$(BIN)/python -m gptfast bench --tune-malloc --out runs/bench/tuned
	$(BIN)/python benchmarks/bench_step.py

bench-generate: $(STAMP)  ## generation with GPT-2 by format, beside transformers, llama.cpp and CTranslate2; the server
	$(BIN)/python benchmarks/bench_generate.py
	$(BIN)/python benchmarks/bench_serve.py

test-sanitize: $(STAMP)  ## the op tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python scripts/test_sanitize.py

gpu-check: install  ## on a machine with an NVIDIA GPU: every op on it, compute-sanitizer, benchmarks
	$(BIN)/python scripts/gpu_check.py

bench-gpu: install  ## the CUDA kernels beside PyTorch's: table, benchmarks/results/<gpu>.json
	$(BIN)/python benchmarks/bench_gpu.py

wheel: $(BIN)/python  ## sdist and wheel in dist/
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet build "setuptools>=77" pybind11 ninja wheel
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:  ## remove what was built, not the virtual environment
	rm -rf build dist gptfast/*.so *.egg-info
