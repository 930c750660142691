# `make help` lists the targets. Each one sets up all that it needs on a fresh machine, and starts at once the next time.
# Overridable: PYTHON (the interpreter that makes the environment), VENV (its folder), PYTEST_ARGS.

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
test test-fast test-all test-isa test-types: export XLA_PYTHON_CLIENT_PREALLOCATE := $(XLA_PYTHON_CLIENT_PREALLOCATE)

.PHONY: help demo test test-fast test-all test-isa test-types lint check-cuda emulate-cuda
.DELETE_ON_ERROR:
# Targets share environments: under -j, two pips must not write to one at once.
.NOTPARALLEL:

help:
	@echo "make demo          generate text with the embedded tiny model"
	@echo "make test          run the tests, without the slow ones (about 9 minutes on two cores)"
	@echo "make test-fast     run a small part of them while you work (90 seconds)"
	@echo "make test-all      run all tests (PYTEST_ARGS='-n 2 ...' for all four test targets)"
	@echo "make test-isa      run the tests that promise bits on a narrower instruction set (ISA=AVX2, AVX or SSE4_2)"
	@echo "make test-types    run tests with every shape and type annotation checked at run time (jaxtyping, beartype)"
	@echo "make lint          ruff, mypy, import rules and sizes of files"
	@echo "make check-cuda    compile the GPU kernels and programs for seven cards, without a GPU (CHECK_CUDA_ARGS='--cards h200 ...')"
	@echo "make emulate-cuda  run the compiled kernels and texts on an emulator, without a GPU (EMULATE_CUDA_ARGS='--cards h200 ...')"

# JAX's own cache is for tests: programs that it hands out cannot be kept for the next start (docs/how_it_works.md).
demo: export JAX_ENABLE_COMPILATION_CACHE := false
demo: $(RUN_READY)
	@$(VENV_PYTHON) scripts/batch_generate.py --recommended-sampling

test: $(DEV_READY)
	@$(VENV_PYTHON) -m pytest -q $(PYTEST_ARGS) -m "not slow"

test-fast: $(DEV_READY)
	@$(VENV_PYTHON) -m pytest -q $(PYTEST_ARGS) -m fast

test-all: $(DEV_READY)
	@$(VENV_PYTHON) -m pytest -q $(PYTEST_ARGS)

# What a row's bits depend on must not hang on the processor: see docs/how_it_works.md.
ISA ?= AVX2
ISA_TESTS := tests/kernels/test_linear.py tests/loading/test_cpu_layout.py tests/decoding/test_speculative.py tests/engine
test-isa: export XLA_FLAGS := --xla_cpu_max_isa=$(ISA)
test-isa: export JAX_COMPILATION_CACHE_DIR := $(JAX_COMPILATION_CACHE_DIR)-$(ISA)
test-isa: $(DEV_READY)
	@$(VENV_PYTHON) -m pytest -q $(PYTEST_ARGS) -m "not slow" $(ISA_TESTS)

TYPED_TESTS := tests/kernels tests/model tests/decoding
test-types: $(DEV_READY)
	@$(VENV_PYTHON) -m pytest -q $(PYTEST_ARGS) -m "not slow" \
	  --jaxtyping-packages=mtpjax,kernels_pallas,checkpoints,tests.helpers.typecheck.check_function $(TYPED_TESTS)

# The last three commands print nothing where the rules of CONTRIBUTING.md hold.
lint: $(DEV_READY)
	@$(VENV_PYTHON) -m ruff check -q .
	@$(VENV_PYTHON) -m ruff format --check -q .
	@$(VENV_PYTHON) -m mypy mtpjax kernels_pallas checkpoints scripts tests
	@$(VENV)/bin/lint-imports --no-logo
	@! git grep -nE 'sys\.path' -- '*.py'
	@! git grep -nE '\bKERNELS\b|\bplatform\(\)|\btarget\(\)' -- 'mtpjax/model/*.py'
	@! git ls-files '*.py' | xargs awk 'FNR == 351 { print FILENAME ": more than 350 lines" }' | grep .

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
