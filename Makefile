# Every target makes the environment it needs. `make help` lists them.
#
#   PYTHON=python3.12   the interpreter of the environment; by default the newest Python >= 3.11 found
#   VENV=folder         where the environment lies; by default .venv
#   ARGS="..."          further arguments of the target's command
#   SPARSE_ATTN_CUDA=ON compile the CUDA kernels in `make setup` too; `make cuda` is faster the second time

VENV ?= .venv
JOBS ?= 2
BAZEL ?= bazel
ARGS ?=
SPARSE_ATTN_CUDA ?= OFF

bin := $(VENV)/bin
ready := $(VENV)/.ready
cpp := $(shell find csrc -name '*.h' -o -name '*.cc' -o -name '*.cuh' -o -name '*.cu')

.PHONY: help setup cuda cuda-wheel kernel-table pallas-plugin pallas-table pallas-versions demo test test-cpu mutants lint format bench bazel-simulator bazel-test clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        train a small language model, sparse and dense, and write figures to demo_out/"
	@echo "make test        run the tests, on the code that compilers make for GPUs too; needs g++, and no GPU"
	@echo "make test-cpu    run those that need no compiler for GPUs"
	@echo "make mutants     break the CUDA kernels, one change at a time, and see whether tests notice; takes hours"
	@echo "make lint        check style and format; 'make format' repairs them"
	@echo "make bench       time attention side by side with the baselines"
	@echo "make cuda        compile the CUDA kernels beside the package; needs g++, and no GPU"
	@echo "make cuda-wheel  compile them into a wheel, in dist/"
	@echo "make pallas-versions  compile the Pallas kernels for an H100 and an A100 with every JAX that can; needs no GPU"
	@echo "make bazel-test  run the tests under Bazel, without a network"
	@echo "make clean       remove everything these targets made"

setup: $(ready)

# The stamp is older than pyproject.toml when what has to be installed may have changed.
$(ready): pyproject.toml CMakeLists.txt
	python=$${PYTHON:-$$(tools/find_python.sh)} && echo "setting up $(VENV) with $$python" && "$$python" -m venv $(VENV)
	SPARSE_ATTN_CUDA=$(SPARSE_ATTN_CUDA) $(bin)/python -m pip install --quiet --editable '.[test,lint,bench,demo]'
	touch $@

with_bin := PATH="$(abspath $(bin)):$$PATH"

# nvcc comes from PyPI where the system has none.
build/cuda/.ready: $(ready)
	SPARSE_ATTN_CUDA=OFF $(bin)/python -m pip install --quiet --editable '.[cuda-dev]'
	$(bin)/python tools/find_nvcc.py || SPARSE_ATTN_CUDA=OFF $(bin)/python -m pip install --quiet --editable '.[cuda-build]'
	$(with_bin) cmake -S . -B build/cuda -G Ninja -DSPARSE_ATTN_CUDA=ON -DPython_EXECUTABLE=$(abspath $(bin))/python
	touch $@

cuda: build/cuda/.ready
	$(with_bin) cmake --build build/cuda
	$(with_bin) cmake --install build/cuda --prefix .

# What `pip install .` makes where there is an nvcc: the same as a wheel, in dist.
cuda-wheel: $(ready)
	SPARSE_ATTN_CUDA=OFF $(bin)/python -m pip install --quiet --editable '.[cuda-dev]'
	rm -rf build/wheel dist
	SPARSE_ATTN_CUDA=ON $(bin)/python -m pip wheel --no-deps --wheel-dir dist --config-settings build-dir=build/wheel .

kernel-table: cuda
	$(with_bin) python -m tools.kernel_table

# XLA's compiler for GPUs, for the JAX of the environment: in a folder of its own, so that nothing else finds it.
pallas-plugin: $(ready)
	$(bin)/python tools/install_pallas_plugin.py

pallas-table: pallas-plugin
	$(bin)/python -m tools.pallas_table

# In environments of their own.
pallas-versions: $(ready)
	$(bin)/python tools/pallas_versions.py $(ARGS)

demo: $(ready)
	$(bin)/python examples/train_lm.py --out demo_out $(ARGS)

test: cuda pallas-plugin test-cpu

# Tests of what a compiler for GPUs makes skip, with a reason, where there is none.
test-cpu: $(ready)
	$(bin)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

mutants: $(ready)
	nice $(bin)/python -m tools.mutants --jobs $(JOBS) $(ARGS)

lint: $(ready)
	$(bin)/ruff check $(ARGS) .
	$(bin)/ruff format --check $(ARGS) .
	$(bin)/clang-format --dry-run -Werror $(cpp)

format: $(ready)
	$(bin)/ruff check --fix $(ARGS) .
	$(bin)/ruff format $(ARGS) .
	$(bin)/clang-format -i $(cpp)

bench: $(ready)
	$(bin)/python -m benchmarks.run $(ARGS)

# Bazel runs the tests with the python3 that it finds on PATH.
bazel-simulator: $(ready)
	$(with_bin) $(BAZEL) build --config=offline $(ARGS) //csrc:host_sim

bazel-test: $(ready)
	$(with_bin) $(BAZEL) test --config=offline $(ARGS) //...

clean:
	rm -rf $(VENV) demo_out build dist .pytest_cache .ruff_cache .hypothesis
	rm -f bazel-*
