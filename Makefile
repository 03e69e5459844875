# make demo: from a fresh clone to a trained GPT. make test: the whole test suite.
# make gpu-check: build, test and time on this machine's GPU, with the PYTHON that is there.
# PYTHON=python3.12 and VENV=/somewhere/else choose another interpreter and another environment.
PYTHON ?= python3
VENV ?= .venv
TORCH := torch==2.13.0

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.pyvizllm-installed
NATIVE = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Threads that wait for work sleep instead of spinning: on a busy or small machine the spinning ones
# take the processor from those that work. libgomp reads this when torch is loaded.
export OMP_WAIT_POLICY ?= passive

# A virtual environment that was only half made is made again.
.DELETE_ON_ERROR:
.PHONY: demo build test lint bench gpu-check clean

demo: build
	$(VENV)/bin/pyvizllm demo

test: build
	$(PY) -m pytest tests

bench: build
	$(PY) -m pytest benchmarks

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# ninja does again only what has changed: a second when nothing has.
build: $(INSTALLED)
	$(PY) setup.py -q build_ext --inplace

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)

# torch first: the package is then built against it, and no second one is fetched for the build.
$(INSTALLED): pyproject.toml setup.py csrc/build_backend.py | $(PY)
	$(PY) -m pip install "$(TORCH)" "setuptools>=77.0.3" ninja pybind11
	$(PY) -m pip install -e ".[dev]"
	touch $@

$(PY):
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info pyvizllm/*.so pyvizllm/_build_config.json
	rm -rf .mypy_cache .pytest_cache .ruff_cache .benchmarks
