# make demo | test | test-gpu | lint | kernels | clean; each sets up what it needs.
#
# PYTHON is the interpreter that makes the environment VENV. To use an environment of your own
# instead, as it is and without installing anything: make test-gpu PY=python3
#
# Tests run in JOBS processes, where pytest-xdist is installed; JOBS=0 runs them in pytest's own,
# as -s needs: make test JOBS=0 PYTEST_ARGS="-s -k compile"

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
INSTALLED := $(VENV)/.installed

ifeq ($(origin PY),command line)
SETUP :=
KERNELS :=
else
PY := $(VENV)/bin/python
SETUP := $(INSTALLED)
KERNELS := kernels
endif
PYTEST := $(PY) -m pytest $(PYTEST_ARGS)
PARALLEL = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses $(JOBS) --dist worksteal)
GPU_TESTS = $(shell grep -l 'mark\.gpu' tests/test_*.py) # other files may import what a GPU machine lacks
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-gpu lint kernels clean

demo: export GEOT_KERNELS_CUDA ?= 0
demo: kernels
	$(VENV)/bin/geot demo

# T0 and T2, without the markers gpu and interpreted (pyproject.toml), then T1, the Triton kernels interpreted:
# in processes of their own, for in one a function cannot be interpreted and compiled.
test: $(KERNELS)
	$(PYTEST) $(PARALLEL) $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m interpreted $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])

test-gpu: $(KERNELS)
	@$(PY) -c 'import torch; torch.cuda.is_available() or exit("make test-gpu: torch %s sees no CUDA device" % torch.__version__)'
	$(PYTEST) -m gpu $(GPU_TESTS)

lint: $(SETUP)
	$(PY) -m ruff check --no-cache .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(CXX_FILES),PATH="$(VENV)/bin:$$PATH" clang-format --dry-run -Werror $(CXX_FILES))

# Compiles the C++ and, with nvcc, the CUDA kernels into the package: what has changed since the last
# time, or nothing. GEOT_KERNELS_CUDA=1 makes it an error where the CUDA kernels do not compile.
kernels: $(INSTALLED)
	$(VENV)/bin/python setup.py -q build_ext --inplace

# The environment stays; to make it anew, delete it.
clean:
	rm -rf build dist *.egg-info geot_kernels/libgeot_* .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV)
	touch $@
