# Two commands for a fresh clone: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# One worker a core; torch itself uses one thread in each.
WORKERS ?= auto

DEMO_PROMPT := a red circle above a blue square on a gray background

.PHONY: FORCE demo quick test pytest soak mutants lint types setup setup-dev clean kernels bench studies \
  gpu gpu-tests gpu-kernels gpu-shapes gpu-sd15 gpu-sd21 gpu-sdxl gpu-waterfall gpu-explainers gpu-games gpu-estimators

demo: $(VENV)/.ready
	@mkdir -p demo
	@if [ -e demo/run.h5 ] && [ -z "$(OVERWRITE)" ]; then \
	  $(BIN)/dfengine info demo/run.h5; \
	  echo "The demo is there already. To compute it again: make demo OVERWRITE=--overwrite"; \
	else \
	  $(BIN)/dfengine explain "$(DEMO_PROMPT)" -o demo/run.h5 --num-steps 30 --seed 0 $(OVERWRITE) && \
	  $(BIN)/dfengine figures demo/run.h5 -o demo/rise.png; \
	fi

# Bytecode is cached whatever the environment says: compiling takes longer than the quick tests. Neighbouring tests share
# fixtures, so each worker takes one stretch of them until another has none left.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# mypy has one core for a minute, in which the tests start.
test: $(VENV)/.dev-ready lint
	@$(MAKE) --no-print-directory -j2 types pytest

pytest: $(VENV)/.dev-ready
	$(PYTEST)

# Under a minute: one case of most branches, for while you work; annotations are not checked.
quick: $(VENV)/.dev-ready
	JAXTYPING_DISABLE=1 $(PYTEST) -m "not slow and not soak" --hypothesis-profile quick

# Exhaustive: a fault before every single write, every process a new one, ten times as many examples of each property.
soak: $(VENV)/.dev-ready
	$(PYTEST) -m "soak or hypothesis" --hypothesis-profile soak

# Breaks constants, signs and orders one by one, and expects a test to fail for each; prints those that survive.
mutants: $(VENV)/.dev-ready
	$(BIN)/python tests/mutants/run.py

# Every kernel compiled for every generation of GPU, without one.
kernels: $(VENV)/.dev-ready
	$(BIN)/python bench/kernels_compiled.py

# The benchmarks of the engine on this machine's processor, the shortest first: about an hour on two cores. Rows are
# recorded from committed sources only.
bench: $(VENV)/.dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python bench/scores.py
	$(BIN)/python bench/shapes_model.py
	$(BIN)/python bench/store.py
	$(BIN)/python bench/profiles.py
	$(BIN)/python bench/throughput.py
	$(BIN)/python bench/explainers.py
	$(BIN)/python bench/concepts.py
	$(BIN)/python bench/sweeps.py
	$(BIN)/python bench/waterfall.py

# The studies of many images: about two hours.
studies: $(VENV)/.dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python bench/estimators.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/certainty.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/certainty.py --reduced
	OMP_NUM_THREADS=1 $(BIN)/python bench/rise_settings.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/inner_maps.py
	$(BIN)/python bench/games.py

# On a machine with a GPU, with the packages of its own (torch, triton, jaxtyping, pytest, scipy; from gpu-shapes on also
# diffusers, transformers, accelerate, h5py): nothing is installed or downloaded. Each takes less than eight minutes,
# writes its rows as it goes, replaces those of this device only, and prints its table last.
gpu: gpu-tests gpu-kernels gpu-shapes gpu-sd15 gpu-sd21 gpu-sdxl gpu-waterfall gpu-explainers gpu-games gpu-estimators
GPU := PYTHONPATH=.:kernels $(PYTHON)

gpu-tests:
	$(GPU) -m pytest -W default -m "" tests/test_fused_*.py
	$(GPU) -m pytest -W default -m gpu tests/test_dispatch.py tests/test_tuning.py

gpu-kernels:
	$(GPU) bench/kernels_measured.py

gpu-shapes:
	$(GPU) bench/throughput.py --batches 1 16 256 1024 4096
	$(GPU) bench/profiles.py shapes

gpu-sd15:
	$(GPU) bench/throughput.py sd15 --random-weights --batches 1 8 32 64 128 --plain-masks 40
	$(GPU) bench/profiles.py sd15

gpu-sd21:
	$(GPU) bench/profiles.py sd21

gpu-sdxl:
	$(GPU) bench/profiles.py sdxl

gpu-waterfall:
	$(GPU) bench/waterfall.py sd15 --random-weights --masks 512 --plain-masks 40 --rounds 1

gpu-explainers:
	$(GPU) bench/explainers.py
	$(GPU) bench/concepts.py
	$(GPU) bench/explainers.py sd15 --random-weights --rounds 1 --group 4

gpu-games:
	$(GPU) bench/games.py

gpu-estimators:
	$(GPU) bench/estimators.py

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev-ready
	$(BIN)/mypy

setup: $(VENV)/.ready

setup-dev: $(VENV)/.dev-ready

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# torch goes first: on a machine without a CUDA build at hand its pinned version is found as a CPU build, and what
# follows then keeps it. setuptools installs this project again below, without the network.
$(VENV)/.requirements: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev-requirements: $(VENV)/.requirements
	$(PIP) --editable '.[dev]'
	@touch $@

# The names of all files of the packages. It changes only where one is added, renamed or removed.
$(VENV)/.files: FORCE
	@mkdir -p $(VENV)
	@find dfengine kernels/dfkernels -type f ! -path '*/__pycache__/*' ! -name '.*' | LC_ALL=C sort >$@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
FORCE:

# An editable install is a tree of links to those files (pyproject.toml says why): seconds.
$(VENV)/.ready: $(VENV)/.requirements $(VENV)/.files
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev-ready: $(VENV)/.dev-requirements $(VENV)/.ready
	@touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
