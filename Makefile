# make demo | test | lint | check-cuda | emulate-cuda: each sets up all it needs on a fresh machine, and starts at once the next time.
# Overridable: PYTHON (interpreter that makes the environment), VENV (its folder), PYTEST_ARGS.

PYTHON      ?= python3
VENV        ?= .venv
PYTEST_ARGS ?= -n 2 --dist worksteal

# The CUDA compiler plugin has its own environment: with it installed, jax would look for a GPU.
CUDA_VENV   ?= .venv-cuda
CHECK_CUDA_ARGS ?= --json docs/benchmarks/cuda_check.json
EMULATE_CUDA_ARGS ?= --json docs/benchmarks/emulated.json

VENV_PYTHON := $(VENV)/bin/python
CUDA_READY  := $(CUDA_VENV)/.installed
RUN_READY   := $(VENV)/.installed-run
DEV_READY   := $(VENV)/.installed-dev
PIP_INSTALL := $(VENV_PYTHON) -m pip install --no-input --disable-pip-version-check
# PIP_CONSTRAINT is pip's own variable; a changed constraints file means installing anew.
INSTALL_FROM := pyproject.toml $(wildcard $(PIP_CONSTRAINT))
# Where the environment's interpreter is gone, what was installed for it does not count.
_ := $(shell test -x $(VENV_PYTHON) || rm -f $(RUN_READY) $(DEV_READY))

# Compiled programs are kept between runs.
JAX_COMPILATION_CACHE_DIR                  ?= $(CURDIR)/.cache/jax
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES  ?= -1
# Test workers share a GPU, so none may take its memory in advance.
XLA_PYTHON_CLIENT_PREALLOCATE              ?= false

export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES
test: export XLA_PYTHON_CLIENT_PREALLOCATE := $(XLA_PYTHON_CLIENT_PREALLOCATE)

.PHONY: help demo test lint check-cuda emulate-cuda
.DELETE_ON_ERROR:
# demo and test share the environment: under -j, two pips must not write to it at once.
.NOTPARALLEL:

help:
	@echo "make demo   generate text with the embedded tiny model"
	@echo "make test   run the tests (PYTEST_ARGS='-n 2 ...')"
	@echo "make lint   ruff check and mypy"
	@echo "make check-cuda   compile the GPU kernels and programs for five cards, without a GPU (CHECK_CUDA_ARGS='--cards h200 ...')"
	@echo "make emulate-cuda   run what they compile to, without a GPU: kernels and texts (EMULATE_CUDA_ARGS='--cards h200 --cases text ...')"

demo: $(RUN_READY)
	@$(VENV_PYTHON) scripts/batch_generate.py --advised

test: $(DEV_READY)
	@$(VENV_PYTHON) -m pytest -q $(PYTEST_ARGS)

lint: $(DEV_READY)
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m mypy mtpjax kernels_pallas checkpoints

# Kernels and programs for GPUs that are not here: nothing runs on one.
check-cuda: $(CUDA_READY)
	@$(CUDA_VENV)/bin/python -m scripts.gpu.check_cuda $(CHECK_CUDA_ARGS)

emulate-cuda: $(CUDA_READY)
	@$(CUDA_VENV)/bin/python -m scripts.gpu.emulate_cuda $(EMULATE_CUDA_ARGS)

$(CUDA_READY): $(INSTALL_FROM)
	@echo "Making $(CUDA_VENV) with $$($(PYTHON) --version 2>&1), jax and its CUDA compiler plugin (about 1.6 GB)"
	@test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	@$(CUDA_VENV)/bin/python -m pip install --no-input --disable-pip-version-check -qq -e '.[check-cuda]'
	@touch $@

# Order-only below: the link's date is that of the system's interpreter and says nothing.
$(VENV_PYTHON):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mtpjax needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version 2>&1)"
	@rm -f $(VENV)/bin/python*
	@$(PYTHON) -m venv $(VENV)

$(RUN_READY): $(INSTALL_FROM) | $(VENV_PYTHON)
	@echo "Installing mtpjax and what it runs on (jax, flax, orbax, ...; about 0.8 GB) into $(VENV). This can take minutes."
	@$(PIP_INSTALL) -qq -e . || { echo "That failed; the full story: $(PIP_INSTALL) -e ." >&2; exit 1; }
	@touch $@

# The tools include all that running needs.
$(DEV_READY): $(INSTALL_FROM) | $(VENV_PYTHON)
	@echo "Installing mtpjax (jax, flax, orbax, ...; about 0.8 GB) and its test and lint tools into $(VENV). This can take minutes."
	@$(PIP_INSTALL) -qq -e '.[dev]' || { echo "That failed; the full story: $(PIP_INSTALL) -e '.[dev]'" >&2; exit 1; }
	@touch $(RUN_READY) $@
