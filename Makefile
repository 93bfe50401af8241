# Every target makes what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch comes first, as the next install would choose a CUDA build. tools/install_torch.py chooses the index: the CPU
# build on Linux without an NVIDIA driver. `make demo TORCH=torch==2.12.0` installs that from pip's default index
# instead, and a $(VENV) that has torch keeps it.
ifdef TORCH
INSTALL_TORCH = $(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
else
INSTALL_TORCH = $(BIN)/python tools/install_torch.py torch==2.13.0
endif

# Tests run in this many processes at once.
WORKERS ?= 2

# Small tensor operations stall when OpenMP threads outnumber the free cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-torch test-slow soak fuzz lint format bench compare-smoke stability-smoke docs dist clean

demo: $(VENV)/.train  ## train a small LLaMA on real text, with one bad batch: about three minutes, no download beyond pip
	$(BIN)/evenstep pretrain recipes/demo.toml $(ARGS)

test: $(VENV)/.dev  ## the test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# The environment of a version is made once, beside the usual one; that version's CUDA build may come with gigabytes.
test-torch:  ## the test suite on another torch: `make test-torch VERSION=2.11.0`
	@test -n "$(VERSION)" || { echo "give a version of torch: make test-torch VERSION=2.11.0" >&2; exit 2; }
	$(MAKE) .venv-torch-$(VERSION)/.dev VENV=.venv-torch-$(VERSION) TORCH=torch==$(VERSION)
	.venv-torch-$(VERSION)/bin/python -c "import torch; assert torch.__version__.split('+')[0] == '$(VERSION)', torch.__version__"
	$(MAKE) test VENV=.venv-torch-$(VERSION) ARGS='$(ARGS)'

test-slow: $(VENV)/.dev  ## the tests that are left out of `make test` for their length
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600 -o faulthandler_timeout=4000 $(ARGS)

soak: $(VENV)/.dev  ## twenty minutes of kills and damage; `make soak ARGS='--minutes 5'`
	$(BIN)/python tests/support/soak.py $(ARGS)

fuzz: $(VENV)/.dev  ## random combinations of features against the plain path; `make fuzz ARGS='--count 100'`
	$(BIN)/python tests/support/differential.py $(ARGS)

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## training throughput against transformers, one thread
	$(BIN)/python benchmarks/throughput.py --compile $(ARGS)

compare-smoke: $(VENV)/.dev  ## a miniature of every table of the papers: about two minutes
	$(BIN)/evenstep compare recipes/tables/*.toml --smoke $(ARGS)

stability-smoke: $(VENV)/.dev  ## a miniature of every task of the stability suite: under two minutes
	$(BIN)/evenstep stability --scale smoke --jobs 0 $(ARGS)

docs: $(VENV)/.dev  ## the documentation site, in site/; any warning and any broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tools/check_links.py site

dist: $(VENV)/.dev  ## the source distribution and a wheel for this machine, in dist/, and a list of their files
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python tools/manifest.py dist

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A change to any of these is installed anew: the editable install sees other changes by itself.
INSTALL := pyproject.toml setup.py $(wildcard evenstep/kernels/*.cpp evenstep/kernels/*.h)

# A virtual environment that exists already gets torch too, unless it has one.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "import torch" 2> /dev/null || $(INSTALL_TORCH)
	@touch $@

$(VENV)/.train: $(INSTALL) | $(VENV)/.torch
	@echo "Installing evenstep in $(VENV): about 110 MB of packages, and the CPU kernels are compiled (a minute)."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train]"
	@touch $@

$(VENV)/.dev: $(INSTALL) | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@ $(VENV)/.train
