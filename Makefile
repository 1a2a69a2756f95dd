# Two commands do everything on a fresh machine with Python and g++:  make demo   and   make test.
# They make a virtual environment of their own in .venv (VENV=… for another place) and install what they need there.

PYTHON  ?= python3
VENV    ?= .venv
BIN      = $(VENV)/bin
BUILT    = $(VENV)/.built
TESTED   = $(VENV)/.test-packages
MACHINE  = $(shell uname -m)
SOURCES  = $(shell find csrc -type f) setup.py

# PyPI's torch for Linux brings gigabytes of CUDA packages. PyTorch's own index has a build for CPUs, which pip prefers
# to PyPI's of the same version (2.13.0+cpu > 2.13.0). On a machine with an NVIDIA GPU it is not asked.
TORCH   ?= torch==2.13.0
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 2)
PIP      = $(BIN)/python -m pip install --disable-pip-version-check

# Test files are dealt to processes, one a core and at most four: each holds torch and transformers, some 2 GB. JOBS=1: none.
JOBS    ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SHARED   = $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder)

.PHONY: help torch-requirement demo demo-finetune bench-finetune bench-evaluate bench-family test test-fast test-sanitize fuzz mutants lint fmt bench bench-cpu bench-step bench-drop-in bench-generate bench-gpu gpu-check docs wheel wheel-macos torch-macos release released clean install

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet --upgrade pip

# torch first: the build uses its headers. The package itself is installed without a build: the line after it builds in
# place, and compiles only what changed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "Installing PyTorch (once; the CPU build is about 200 MB)"; \
		$(PIP) $(TORCH) $(TORCH_INDEX); }
	@echo "Installing what gptfast needs"
	$(PIP) --quiet "setuptools>=77" ninja wheel
	GPTFAST_BUILD=0 $(PIP) --quiet --no-build-isolation --editable .
	@touch $@

$(BUILT): $(VENV)/.installed $(SOURCES)
	@echo "Compiling the kernels (two to four minutes on two cores the first time, then only what changed)"
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(TESTED): $(BUILT) pyproject.toml
	@echo "Installing the packages of the tests (once, about 2.5 GB: transformers, Triton, pyright and others)"
	$(PIP) --quiet --group test
	@touch $@

install: $(TESTED)  ## virtual environment, build, editable install, packages of the tests

demo: $(BUILT)  ## train a small GPT on Shakespeare for three minutes, then let it write
	$(BIN)/python -m gptfast.demo

demo-finetune: $(TESTED)  ## pre-train on half of Shakespeare, then tell the genre of unseen works, by each method of fine-tuning
	$(BIN)/python -m gptfast.demo_finetune

test: $(TESTED) $(if $(WHEEL),released) lint  ## the whole test suite; WHEEL=1: on the libraries of the wheel, which it builds
	$(BIN)/python -m pytest --whole $(SHARED)

test-fast: $(TESTED)  ## the tests that take under three seconds each
	$(BIN)/python -m pytest -m "not slow" $(SHARED)

lint: $(TESTED)  ## ruff, clang-format, codespell, import-linter and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

fmt: $(TESTED)  ## bring the sources into the form that lint wants: ruff, clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(TESTED)  ## every op beside eager PyTorch and torch's own functions: table, JSON, PNG
	$(BIN)/python -m gptfast bench

bench-cpu: $(TESTED)  ## the same with malloc as installed and tuned, and the training step of GPT-2 beside transformers
	$(BIN)/python -m gptfast bench --out runs/bench/installed
	$(BIN)/python -m gptfast bench --tune-malloc --out runs/bench/tuned
	$(BIN)/python benchmarks/bench_step.py

bench-step: $(TESTED)  ## GPT-2's step in `gptfast train` beside forward + backward + one pass of the optimizer; cost of loader and log
	$(BIN)/python benchmarks/bench_train.py

bench-drop-in: $(TESTED)  ## a patched transformers GPT-2 beside gptfast.GPT and beside itself unpatched: step, memory, generate
	$(BIN)/python benchmarks/bench_drop_in.py --plain --generate

bench-finetune: $(TESTED)  ## GPT-2's step full, frozen, with LoRA and QLoRA, the 4-bit products, decoding with adapters; beside peft and bitsandbytes
	$(BIN)/python benchmarks/bench_finetune.py

bench-evaluate: $(TESTED)  ## lm-evaluation-harness with our model beside `hf`: multiple choice, cloze, few shots
	$(BIN)/python benchmarks/bench_evaluate.py

bench-family: $(TESTED)  ## BERT's attention with padding and dropout, Llama's row ops, experts; beside SDPA, a copy, loops and reading
	$(BIN)/python benchmarks/bench_family.py

bench-generate: $(TESTED)  ## generation with GPT-2 by format, beside transformers and, with PEERS="--llama-bin …", others; the server
	$(BIN)/python benchmarks/bench_generate.py $(PEERS)
	$(BIN)/python benchmarks/bench_serve.py

mutants: $(TESTED)  ## put known mistakes into a copy of the code, see whether the tests find each
	$(BIN)/python scripts/mutants.py

test-sanitize: $(TESTED)  ## the op tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python scripts/test_sanitize.py

gpu-check bench-gpu: export TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
fuzz: $(TESTED)  ## look for faults by chance: damaged files, ops, disks that fail, bodies of clients; MINUTES=60
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),60)

gpu-check: install  ## on a machine with an NVIDIA GPU: PART=ops, speed, family, model, triton or profile, eight minutes each; or all
	$(BIN)/python scripts/gpu_check.py $(PART)

bench-gpu: install  ## the CUDA kernels beside PyTorch's: table, benchmarks/results/<gpu>.jsonl
	$(BIN)/python benchmarks/bench_gpu.py

torch-requirement:  # pip's arguments for the torch that is installed here, for .ci/run
	@echo "$(TORCH) $(TORCH_INDEX)"

# Zig's clang against an old glibc, with a C++ library of its own. The sdist is made first, and the wheel from it: objects of
# the tree are not used. auditwheel refuses what manylinux_2_28 does not have, abi3audit what Python 3.10 does not have.
wheel: $(VENV)/.installed  ## sdist and wheel in dist/: Linux with glibc >= 2.28, Python >= 3.10, torch >= 2.11
	$(PIP) --quiet --group wheel
	rm -rf build/wheel dist
	CXX="$(abspath $(BIN))/python -m ziglang c++ -target $(MACHINE)-linux-gnu.2.28" GPTFAST_CUDA=0 \
		$(BIN)/python -m build --no-isolation --outdir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_$(MACHINE) --only-plat \
		--exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	$(BIN)/abi3audit --strict --assume-minimum-abi3 3.10 dist/*.whl
	cp build/wheel/*.tar.gz dist

# torch's wheel for macOS has what the ops are compiled and linked against. Nothing of either runs here.
MACOS = build/torch-macos
$(MACOS)/torch/version.py: | $(BIN)/python
	$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --platform macosx_14_0_arm64 --python-version 3.11 \
		--dest $(MACOS) "$(TORCH)"
	$(BIN)/python -m zipfile -e $(MACOS)/torch-*-macosx_14_0_arm64.whl $(MACOS)
	@touch $@

torch-macos: $(MACOS)/torch/version.py  ## torch for macOS in build/torch-macos (111 MB), for `make wheel-macos` and its test

wheel-macos: $(VENV)/.installed $(MACOS)/torch/version.py  ## wheel in dist/ for macOS 14 or newer on arm64, cross-built: it links, and has not run
	$(PIP) --quiet --group wheel
	CXX="$(abspath $(BIN))/python -m ziglang c++ -target aarch64-macos.14.0" GPTFAST_CUDA=0 GPTFAST_TORCH="$(abspath $(MACOS))/torch" \
		$(BIN)/python -m build --no-isolation --outdir build/wheel-macos .
	mkdir -p dist && cp build/wheel-macos/*-macosx_14_0_arm64.whl dist

# twine: the description renders, the metadata are complete; check-wheel-contents: no file too many, none twice.
release: wheel  ## `make wheel`, and the checks of an index on what lies in dist/
	$(PIP) --quiet --group release
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	@ls -l dist

# The site reads the sources and imports nothing of them: it needs neither torch nor a build.
docs: | $(BIN)/python  ## the documentation as a site in build/site; a warning is an error
	$(PIP) --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

# `make test WHEEL=1`: the libraries of the wheel in the place of g++'s. They get an old date, so that the next build replaces them.
released: wheel $(TESTED)
	$(BIN)/python scripts/take_libraries.py dist/*.whl
	@rm -f $(BUILT)

clean:  ## remove what was built, not the virtual environment
	rm -rf build dist gptfast/*.so *.egg-info
