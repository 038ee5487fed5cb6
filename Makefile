# The front door: each target sets up what it needs first. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help setup build wheel wheel-test demo test test-cpp test-python properties bench format lint docs fuzz clean

# Seconds for each fuzzer of `make fuzz`.
FUZZ_SECONDS ?= 600
# Random cases of `make properties`.
CASES ?= 100000
# Extra settings for CMake, e.g. CMAKE_ARGS=-DKALMANET_WERROR=ON
CMAKE_ARGS ?=
JOBS ?= $(shell nproc)
export TEXT MINUTES STEPS OUT

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo 'make demo TEXT=path   any text file or folder; MINUTES=2 or STEPS=500 for a shorter run'
	@echo 'tools/setup --cuda    PyTorch with CUDA instead of the CPU build'

setup:  ## Debian packages and .venv (every target does this first)
	@tools/setup

build: setup  ## compile everything, preset release, in build/release
	cmake --preset release $(CMAKE_ARGS)
	cmake --build --preset release --parallel $(JOBS)

wheel: setup  ## the Python package as a wheel in dist/, checked
	@tools/wheel

# The oldest PyTorch, the one that .venv is made with, and a newer one. VERSION@PYTHON names another
# Python: make wheel-test WHEEL_TORCH="2.11.0@python3.10 2.13.0"
WHEEL_TORCH ?= 2.11.0 2.13.0 2.14.1
wheel-test: wheel  ## the wheel beside other PyTorch versions (gigabytes, half an hour)
	@tools/wheel --test-only $(WHEEL_TORCH)

demo: setup  ## train a small model on real text and talk to it (about five minutes)
	cmake --preset release $(CMAKE_ARGS)
	cmake --build --preset release --parallel $(JOBS) --target kalmanet
	@tools/demo

test: test-cpp test-python  ## all tests, C++ and Python

test-cpp: build
	ctest --preset release --parallel $(JOBS) --exclude-regex '^torch_ops$$'

# With tests/torch, which ctest knows as torch_ops.
test-python: build
	KALMANET_COMMAND=$(CURDIR)/build/release/apps/kalmanet \
	KALMANET_SAFETENSORS_TOOL=$(CURDIR)/build/release/tests/models/safetensors_tool \
	KALMANET_TORCH_LIBRARY=$(CURDIR)/build/release/src/torch/libkalmanet_torch.so \
	KALMANET_JAX_LIBRARY=$(CURDIR)/build/release/src/jax/libkalmanet_jax.so \
	  .venv/bin/python -m pytest

properties: setup  ## promises on random problems (CASES=100000)
	cmake --preset core-only $(CMAKE_ARGS)
	cmake --build --preset core-only --parallel $(JOBS) --target property_test
	KALMANET_PROPERTY_CASES=$(CASES) build/core-only/tests/api/property_test

bench: build  ## speed against OpenBLAS and PyTorch
	@benchmarks/run

format: setup  ## format all sources in place
	@tools/format

lint: build  ## formatting, order of the rooms, clang-tidy, ruff, mypy
	@tools/format --check
	@tools/check_files
	@tools/check_layers
	@tools/python_reference --check
	@tools/check_isa
	@tools/check_kernels
	@.venv/bin/mypy
	@tools/tidy

docs: build  ## check the docs: links, commands, flags and quoted code
	@tools/check_docs

fuzz: setup  ## fuzz the readers of model files (FUZZ_SECONDS=600 each)
	cmake --preset fuzz
	cmake --build --preset fuzz --parallel $(JOBS) --target fuzzers
	@tools/fuzz $(FUZZ_SECONDS)

clean:  ## remove build/; .venv and trained models stay
	rm -rf build
