# `make demo` and `make test` do everything from a fresh clone; `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check --quiet
demo_run := runs/digits_vit
timm_floor := $(shell sed -n 's/^ *"timm>=\([0-9.]*\)".*/\1/p' pyproject.toml)
# Collecting every test takes longer than a third of those that read the clock.
clock_tests = $(shell grep -rl --include='test_*.py' 'mark\.clock' tests)
# What also runs on devices, with whatever Python they have.
on_devices := $(wildcard toolchain/on_device/*.py)

# ONNX Runtime's Linux wheels report usage by default.
export ORT_DISABLE_TELEMETRY := 1
# Tests start hundreds of Python processes, each of which would compile slimvit anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo gate test test-slow test-floor lint docs site clean distclean bench-paper bench-ablation bench-peers bench-latency \
	bench-scale bench-seeds bench-validity bench-speed bench-floor bench-targets bench-formats bench-sizes bench-real bench-report
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## install, then train, compress, export and time the digits model (runs/digits_vit)
	$(bin)/slimvit run models/digits_vit/recipe.toml --out $(demo_run)

gate: $(VENV)/.installed  ## hold what the demo wrote to its budgets of size, parameters and accuracy
	$(bin)/slimvit gate --config models/digits_vit/gate.toml --why

test: lint  ## install with the development tools, then lint, types, import layers, Dockerfiles, tests; those that measure run alone
	$(bin)/python -m pytest -m "clock and not slow and not gpu" $(clock_tests)
	$(bin)/python -m pytest -m "not clock and not slow and not gpu" --numprocesses auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder

test-slow: $(VENV)/.installed-dev  ## what `make test` leaves out: every structure on every runtime, runs that are killed, a release elsewhere (minutes)
	$(bin)/python -m pytest -m "clock and slow and not gpu" $(clock_tests)
	$(bin)/python -m pytest -m "slow and not clock and not gpu" --numprocesses auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder

lint: $(VENV)/.installed-dev  ## everything that `make test` checks without running the code
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/vermin --no-tips --violations --target=3.8- $(on_devices)
	$(bin)/hadolint docker/*.Dockerfile

# The oldest timm that pyproject.toml allows, beside the one that is installed; torch stays what it is, and deprecates what timm used.
test-floor: $(VENV)/timm-$(timm_floor)  ## the model families and every block structure with the oldest timm that is supported
	PYTHONPATH=$(abspath $<) $(bin)/python -W ignore -c 'import timm; assert timm.__version__ == "$(timm_floor)", timm.__file__'
	PYTHONPATH=$(abspath $<) $(bin)/python -m pytest tests/families tests/contracts/test_structures.py tests/interpreter/test_interpreter.py \
		-W ignore::FutureWarning:torch.jit._script -W ignore::DeprecationWarning:torch.jit._script \
		--numprocesses auto --maxprocesses 4

docs: $(VENV)/.installed-dev  ## write the map of toolchain/ into docs/architecture.md
	$(bin)/python docs/architecture_map.py

site: $(VENV)/.installed-dev  ## the documentation as pages that open from a disk: build/site/index.html
	$(bin)/python docs/site_pages.py
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --quiet

# A suite goes on from the cells that are recorded; one thread, unless OMP_NUM_THREADS says otherwise.
define suite
OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(bin)/python benchmarks/run.py $(1)
$(bin)/python benchmarks/report.py $(1)
endef

bench-paper: $(VENV)/.installed-bench  ## the default method beside the published ones, with its tables (hours)
	$(call suite,paper)

bench-ablation: $(VENV)/.installed-bench  ## what each part of the default method is worth (hours)
	$(call suite,ablation)

bench-peers: $(VENV)/.installed-bench  ## the same model and size by Torch-Pruning (hours)
	$(call suite,peers)

bench-latency: $(VENV)/.installed-bench  ## a latency budget, two forms of attention and a peer, timed (on a quiet machine)
	$(call suite,latency)

bench-scale: $(VENV)/.installed-bench  ## time and memory of compressing DeiT-T, -S and -B
	$(call suite,scale)

bench-seeds: $(VENV)/.installed-bench  ## how small the default method makes a model without training, three seeds (an hour)
	$(call suite,seeds)

bench-validity: $(VENV)/.installed-bench  ## whether the latency protocol says what is true (hours, on a quiet machine)
	$(call suite,validity)

bench-speed: $(VENV)/.installed-bench  ## latency of DeiT shapes, dense and compressed (hours, on a quiet machine)
	$(call suite,speed)

bench-floor: $(VENV)/.installed-bench  ## how much of the ideal speedup of DeiT shapes is real (on a quiet machine)
	$(call suite,floor)

bench-targets: export OMP_NUM_THREADS ?= 2
bench-targets: $(VENV)/.installed-bench  ## two models as every file that ships: bytes, parity, latency (on a quiet machine)
	$(call suite,targets)

bench-formats: export OMP_NUM_THREADS ?= 2
bench-formats: $(VENV)/.installed-bench  ## two models on every runtime, phones' and browsers' among them (on a quiet machine)
	$(call suite,formats)

bench-sizes: $(VENV)/.installed-bench  ## one budget of bytes, several precisions, and the one that `any` takes (hours)
	$(call suite,sizes)

bench-real: export OMP_NUM_THREADS ?= 2
bench-real: $(VENV)/.installed-bench  ## a pretrained DINOv2 on photographs out of Debian packages, beside Torch-Pruning
	$(call suite,real)

bench-report: $(VENV)/.installed-bench  ## write all pages, the cards of models/, and what docs/ shows anew, from the records alone
	$(bin)/python benchmarks/report.py

clean:  ## remove caches, build folders and the demo's results
	rm -rf $(demo_run) build dist htmlcov .coverage *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find toolchain tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment, and what npm installed for the examples, as well
	rm -rf $(VENV) examples/web/node_modules

$(VENV)/timm-$(timm_floor): $(VENV)/.installed-dev
	$(pip) install --no-deps --upgrade --target $@ timm==$(timm_floor)
	@touch $@

# The stamps are newer than pyproject.toml exactly when what it asks for is installed.
$(VENV)/.installed: pyproject.toml | $(bin)/python
	@echo "Installing slimvit into $(VENV); the first time this downloads PyTorch and takes some minutes."
	$(pip) install --editable '.[trt-rtx]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(pip) install --editable '.[dev,trt-rtx]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(pip) install --editable '.[bench,trt-rtx]'
	@touch $@

$(bin)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "slimvit: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "slimvit: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "slimvit: $(PYTHON) cannot create virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
