# Targets are documented by the text after ##; `make` alone prints them.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One of two extras that exclude each other: faiss for a machine with or without an NVIDIA GPU.
EXTRA := $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: help venv demo test lint format weights experiment clean

help: ## print this list
	@echo "MotionRAG: retrieved motion for frozen image-to-video backbones"
	@echo
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

venv: $(STAMP) ## create .venv and install everything (other targets do it by themselves)

# torch goes first and alone: the rest then builds on the wheel that fits this machine instead of choosing one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed; run make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV) ($(EXTRA)): a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRA),dev]'
	@touch $@

demo: venv ## the whole pipeline on synthetic clips; leaves outputs/demo/report.html
	$(BIN)/motionrag demo
	@echo "Open outputs/demo/report.html in a browser (one file, works offline)."

# one thread each: two processes of two threads wait for one another most of the time
test: venv ## run the tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: venv ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

weights: venv ## train the tiny weights that ship with the package again
	PATH="$(CURDIR)/$(BIN):$$PATH" bash experiments/tiny_weights/make.sh

experiment: venv ## run experiments/NAME again: its table, plot and results.json (make experiment NAME=headline)
	$(BIN)/python experiments/run.py $(or $(NAME),$(error give the experiment: make experiment NAME=headline))

clean: ## remove the environment and all results
	rm -rf $(VENV) outputs multirun
