# `make help` lists the targets. Options of the setup: FRAMEWORKS=torch,tf|torch|tf  ACCELERATOR=cpu|cuda  WITH_MPI=0|1
PYTHON ?= python3.11
NP ?= 2
RECIPE ?= mnist_mlp_torch
ARGS ?=
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help setup train test lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## make .venv and build Horovod into it (idempotent; options: FRAMEWORKS, ACCELERATOR, WITH_MPI)
	@$(PYTHON) build/setup.py $(foreach option,FRAMEWORKS ACCELERATOR WITH_MPI,$(if $($(option)),$(option)=$($(option))))

train: setup ## set up and train: make train NP=2 RECIPE=mnist_mlp_torch ARGS="train.epochs=5"
	$(IN_VENV) horovodrun -np $(NP) python -m recipes.$(RECIPE) $(ARGS)

test: setup ## set up and run all tests
	$(IN_VENV) python -m pytest

lint: setup ## ruff and mypy
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy

bench: setup ## step times side by side with other programs, and what is spent on anything else (about 11 minutes)
	$(IN_VENV) python -m benchmarks.side_by_side
	$(IN_VENV) python -m benchmarks.overheads

clean: ## remove .venv and what tools left behind (not the wheel cache, not outputs/)
	rm -rf .venv .*_cache *.egg-info
