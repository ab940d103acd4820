# make demo | test | test-gpu | lint | kernels | clean; each sets up what it needs.
#
# PYTHON is the interpreter that makes the environment VENV. To use an environment of your own
# instead, as it is and without installing anything: make test-gpu PY=python3

PYTHON ?= python3
VENV ?= .venv
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
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-gpu lint kernels clean

demo: kernels
	$(VENV)/bin/geot demo

# T0, without the markers gpu and interpreted (pyproject.toml), then T1, the Triton kernels interpreted: in
# a process of its own, for in one a function cannot be interpreted and compiled.
test: $(KERNELS)
	$(PYTEST) $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])
	TRITON_INTERPRET=1 $(PYTEST) -m interpreted $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])

test-gpu: $(KERNELS)
	@$(PY) -c 'import torch; torch.cuda.is_available() or exit("make test-gpu: torch %s sees no CUDA device" % torch.__version__)'
	$(PYTEST) -m gpu

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(CXX_FILES),PATH="$(VENV)/bin:$$PATH" clang-format --dry-run -Werror $(CXX_FILES))

# Compiles the C++ kernels into the package: what has changed since the last time, or nothing.
kernels: $(INSTALLED)
	$(VENV)/bin/python setup.py -q build_ext --inplace

# The environment stays; to make it anew, delete it.
clean:
	rm -rf build dist *.egg-info geot_kernels/libgeot_* .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV)
	touch $@
