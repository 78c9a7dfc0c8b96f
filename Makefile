# What `make help` prints of the options; those of the setup that are left out keep their last values:
#   FRAMEWORKS=torch,tf|torch|tf     what Horovod is built for
#   ACCELERATOR=cpu|cuda             where tensors are
#   WITH_MPI=0|1                     build MPI in
#   TORCH_INDEX=pip|URL|FOLDER       where torch comes from: an index of packages, or a folder of wheels
#   HOROVOD_WHEEL=build|FILE|URL     builds Horovod, or installs a wheel that `make wheel` has made
#   PYTHON=/path/to/python3          the Python of the setup, 3.10 to 3.13; the newest that is there, or that of .venv
#   out=FOLDER                       where make wheel puts the wheel
#   NP=2                             ranks of make train
#   RECIPE=mnist_mlp_torch           what make train trains
#   ARGS="key=value ..."             and how
#   SECONDS=60                       of each run of make stress
#   SOURCE=FOLDER                    a checkout of Horovod v0.28.1, for make upstream-tests
SETUP_OPTIONS := FRAMEWORKS ACCELERATOR WITH_MPI TORCH_INDEX HOROVOD_WHEEL
OPTIONS := $(SETUP_OPTIONS) PYTHON NP RECIPE ARGS SECONDS SOURCE out
# These go on to the compiler and to Horovod's build.
BUILD_VARIABLES := CXX CXXFLAGS HOROVOD_CUDA_HOME HOROVOD_NCCL_HOME

# make itself says nothing about a misspelt variable.
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(OPTIONS) $(BUILD_VARIABLES),$(GIVEN))
ifneq ($(UNKNOWN),)
$(error $(foreach name,$(UNKNOWN),$(name)=$($(name)):) not an option; choose from $(OPTIONS), or $(BUILD_VARIABLES))
endif

NEWEST_PYTHON = $(shell for minor in 13 12 11 10; do \
  python3.$$minor -c 1 2>/dev/null && echo python3.$$minor && break; done)
PYTHON ?= $(or $(wildcard .venv/bin/python),$(NEWEST_PYTHON),python3)
NO_PYTHON = PYTHON=$(PYTHON): no Python that runs; the setup needs Python 3.10 to 3.13 with venv and headers (Debian, Ubuntu: \
  python3.11 python3.11-venv python3.11-dev), found on the PATH or named: make setup PYTHON=/path/to/python3.11
NP ?= 2
RECIPE ?= mnist_mlp_torch
ARGS ?=
SECONDS ?= 60
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help setup train test wheel wheel-check stress scripts reproducible elastic simulate elastic-demo upstream-tests lint bench clean

help: ## list the targets and the options
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24
	@sed -n 's/^#   /  /p' $(MAKEFILE_LIST)

setup: ## make .venv and build Horovod into it; does nothing where that is done
	$(if $(shell $(PYTHON) -c "print(1)" 2>/dev/null),,$(error $(NO_PYTHON)))
	@$(PYTHON) install/setup.py $(foreach option,$(SETUP_OPTIONS),$(if $($(option)),'$(option)=$($(option))'))

train: setup ## set up and train: make train NP=2 RECIPE=mnist_mlp_torch ARGS="train.epochs=5"
	$(IN_VENV) horovodrun -np $(NP) python -m recipes.$(RECIPE) $(ARGS)

test: setup ## set up and run all tests, two at a time
	$(IN_VENV) python -m pytest -n 2

wheel: setup ## Horovod's wheel for the frameworks of .venv, into the folder out
	$(if $(out),,$(error out=: name the folder for the wheel: make wheel out=FOLDER))
	$(IN_VENV) python install/horovod/wheel.py --out '$(out)'

wheel-check: setup ## the wheel alone, in a new environment: it averages in PyTorch and in Keras
	$(IN_VENV) python -m install.horovod.check_wheel

stress: setup ## all of Horovod's operations at once, on 2, 3 and 4 ranks, through memory and sockets
	@case '$(SECONDS)' in ''|*[!0-9]*) echo 'SECONDS=$(SECONDS): not a whole number' >&2; exit 2;; esac
	$(IN_VENV) STRESS_SECONDS=$(SECONDS) python -m pytest -k everything_at_once tests/install/test_horovod.py

scripts: setup ## scripts of one's own on 2 and 3 ranks give what their authors get in one process
	$(IN_VENV) SCRIPT_RANKS=2,3 python -m pytest tests/script

reproducible: setup ## train.reproducible=true gives the same bits in 12 layouts and 4 resumes, for two tasks, also compressed
	$(IN_VENV) REPRODUCIBLE=all python -m pytest tests/training/test_reproducible.py

simulate: setup ## 10,000 runs in a simulation, each with other failures drawn from its seed (2 to 6 minutes)
	$(IN_VENV) python -m tests.simulation seeds=0-9999

elastic-demo: setup ## two local hosts, of which one is lost and comes back: what happens, and what it costs (1 minute)
	$(IN_VENV) python -m recipes elastic-demo

elastic: setup ## kill -9 at random steps, 25 runs of each kind, a hundred in one run, hosts that come and go (2 hours)
	$(IN_VENV) ELASTIC_RUNS=25 python -m pytest tests/training/test_elastic.py

upstream-tests: setup ## Horovod's own tests from SOURCE; says which fail, and why that is expected
	$(if $(SOURCE),,$(error SOURCE=: name the folder of a checkout of Horovod v0.28.1))
	$(IN_VENV) python install/horovod/upstream_tests.py '$(SOURCE)'

lint: setup ## ruff and mypy
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy

bench: setup ## step times side by side with other programs, and what is spent on anything else (8 to 11 minutes)
	$(IN_VENV) python -m benchmarks.side_by_side
	$(IN_VENV) python -m benchmarks.overheads

clean: ## remove .venv and what tools left behind (not the wheel cache, not outputs/)
	rm -rf .venv .*_cache *.egg-info
