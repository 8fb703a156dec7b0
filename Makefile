# make demo   the main job, end to end        make test   the tests
# Everything is set up on first use in .venv; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
PROFILE ?=
N ?= 10000
SEED ?= 0
STEPS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadfile
QUICK := -m "not slow and not gpu and not browser and not slurm"
# what a change of a utility, a loss or a table can break; what imports diffusers or trains for long is left to make test
CHECKED := dkto/objective toy tests/objective tests/data tests/toy tests/test_notebooks.py tests/test_package.py
LEFT_OUT := --ignore=tests/data/test_encode.py --ignore=tests/toy/test_toy_notebooks.py \
  --ignore=tests/toy/test_toy_pointwise.py \
  --deselect=tests/toy/test_toy_training.py::test_member_k_is_the_model_trained_alone \
  --deselect=tests/test_package.py::test_every_exported_name_is_there_and_is_no_module
COVERAGE := --cov=dkto --cov=toy --cov-report=term
NOTEBOOKS = find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -print0

.DEFAULT_GOAL := help
.PHONY: help setup demo check check-class slides test test-all toy paper bench gpu lab lint format site page reference results fuzz clean

help:
	@echo "make demo      likes of generated pictures -> tuned model -> win-rates (about 5 minutes on 2 cores)"
	@echo "make check     objective, data, toy and the form of the notebooks, after a small change (under a minute)"
	@echo "make test      the tests (about 12 minutes on 2 cores, more on old ones)"
	@echo "make test-all  the tests with the slow and browser ones, and what they cover"
	@echo "make lab       JupyterLab on this machine only; prints its address with the token"
	@echo "make check-class  is this machine ready for a class? One line a check, under a minute"
	@echo "make lint      ruff and nbstripout checks;  make format  applies them"
	@echo "make bench     the benchmarks"
	@echo "make gpu       what only a graphics card shows, in 8 minutes on one (DRY=1 make gpu tries the script without one)"
	@echo "make fuzz      N=10000 damaged inputs for every reader, and what became of them (SEED=0; about 25 minutes on 2 cores)"
	@echo "               CRASH=1 make fuzz: also a kill before every file operation of every command, and 200 at random"
	@echo "make setup     only the environment (.venv); every target above does it first"
	@echo "make clean     remove outputs and caches (not .venv)"
	@echo "make toy       every objective on the 2-D world, 20 seeds (1 minute; PROFILE=full make toy: several minutes)"
	@echo "make paper     the paper's tables on the small world (about an hour on 2 old cores; PROFILE=quick make paper: 13 minutes)"
	@echo "make site      README, the lessons as they ran and all functions as web pages that open from disk"
	@echo "make page      Teach a diffusion model your taste: one HTML file that draws and trains, offline, by a double click"
	@echo "make slides    question, predictions, figures and findings of each lesson, a screen each"
	@echo "make reference runs the lessons whose kept run is missing or outdated, and keeps them"
	@echo "make results   papermill_runs/RESULTS.md from the kept runs"

setup: $(READY)

# The stamp is written last: an interrupted set-up leaves no stamp, and the next call goes on. pip writes RECORD last, so
# a package without one was cut short and is installed again. torch comes first and by its exact pin, so that nothing
# else chooses a build of it; one of that version that is already in .venv stays.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "dkto needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1). Call make PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || \
	  { echo "$(PYTHON) could not make a virtual environment: install its venv module (Debian: apt-get install python3-venv)"; \
	    rm -rf $(VENV); exit 1; }
	@for info in $(VENV)/lib/python*/site-packages/*.dist-info; do test -e "$$info/RECORD" || rm -rf "$$info"; done
	@echo "setting up $(VENV): a few minutes and 2 GB, once; if it is interrupted, the same command goes on"
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[dev,batch]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/dkto demo

check: $(READY)
	$(PYTEST) $(PARALLEL) -m "not process and not slow and not gpu" $(CHECKED) $(LEFT_OUT)

check-class: $(READY)
	$(BIN)/python -m dkto.workshop.check_class

test: $(READY)
	$(PYTEST) $(PARALLEL) $(QUICK)

test-all: $(READY)
	$(PYTEST) $(COVERAGE)

lab: $(READY)
	$(BIN)/jupyter lab --ip=127.0.0.1 --no-browser notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(NOTEBOOKS) | xargs -0 -r $(BIN)/nbstripout --keep-id --verify

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(NOTEBOOKS) | xargs -0 -r $(BIN)/nbstripout --keep-id

bench: $(READY)
	$(PYTEST) tests/benchmarks

gpu: $(READY)
	cd tests && HF_HUB_OFFLINE=1 PYTHONPATH=.. ../$(BIN)/python -m gpu $(if $(DRY),--dry)

fuzz: $(READY)
	cd tests && PYTHONPATH=.. ../$(BIN)/python -m fuzz $(N) --seed $(SEED)
	$(if $(CRASH),$(PYTEST) -s tests/fuzz/test_crash_points.py)

toy: $(READY)
	$(BIN)/python -m toy --profile $(or $(PROFILE),small)

site: $(READY)
	-$(BIN)/python -m dkto.web.page
	$(BIN)/python -m dkto.workshop.site

# onnxruntime for browsers comes from npm once, known by its hash; after that no network is needed
page: $(READY)
	$(BIN)/python -m dkto.web.page

slides: $(READY)
	$(BIN)/python -m dkto.workshop.slides

reference: $(READY)
	$(BIN)/python -m dkto.workshop.keep_lessons

results: $(READY)
	$(BIN)/python -m dkto.workshop.results

paper: $(READY)
	$(BIN)/dkto paper --profile $(or $(PROFILE),default) $(if $(STEPS),--steps $(STEPS))

clean:
	rm -rf papermill_runs/outputs .pytest_cache .ruff_cache .hypothesis .coverage .benchmarks tests/benchmarks/results.json
	find dkto toy tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
