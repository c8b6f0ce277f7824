# Each target builds what it needs: a virtual environment in .venv with the package in it, compiled in place.
#   make demo    the main job on real traffic, on two test hosts made for it
#   make test    the tests, and a short part of the benchmarks once, untimed
#   make test-fast-off, make test-fast-on   the same with every fast path forced off, or on (kernelshim/fastpaths.pyx)
#   make conformance   CPython's own socket tests over a real link, against the kernel's stack and against itself
#   make programs  real programs by `ulnet run`, each compared with itself on kernel sockets
#   make soak    the long forms of some tests: a gibibyte each way, ten thousand forks, long random walks
#   make bench   the benchmark suite (needs quiet processors); make history shows the runs so far
#   make compare BASE=...   times, and instructions by callgrind, against another revision, in turn
#   make counts  exact counts of system calls, frames and copies on the hot path
#   make lint    ruff, mypy, stubs against what is compiled, performance hints of the Cython build
#   make dist    sdist and wheel in dist/, the wheel tried in a fresh environment

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard $(foreach folder,ulnet/kernelshim ulnet/stack,$(addprefix $(folder)/*,.pyx .pxd .h))) setup.py pyproject.toml Makefile

.PHONY: demo test test-fast-off test-fast-on conformance programs soak bench history compare counts lint dist clean
demo: .stamp-build
	@$(BIN)/python -m ulnet demo

test: .stamp-build
	$(BIN)/python -m pytest -q tests
	$(BIN)/python -m pytest -q bench --benchmark-disable -k "not end_to_end and not select"

test-fast-off test-fast-on: .stamp-build
	ULNET_FAST=$(@:test-fast-%=%) $(BIN)/python -m pytest -q tests

conformance: .stamp-build
	$(BIN)/python -m ci.conformance

programs: .stamp-build
	$(BIN)/python -m pytest -v --no-header --tb=short --durations=0 --durations-min=0.1 tests/programs

soak: .stamp-build
	ULNET_SOAK=1 $(BIN)/python -m pytest -v -s --no-header tests/acceptance/test_transfer.py tests/acceptance/test_many.py \
	  tests/acceptance/test_forks.py tests/test_socket_machine.py

bench: .stamp-build
	$(BIN)/python -m pytest -q bench --benchmark-autosave

history: .stamp-venv
	@$(BIN)/python bench/history.py

BASE ?= HEAD
compare: .stamp-build
	$(BIN)/python -m ci.compare $(BASE)

counts: .stamp-build
	$(BIN)/python -m ci.counts

lint: .stamp-build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python ci/stubs.py
	$(BIN)/python ci/hints.py

dist: .stamp-venv
	PYTHONPATH=. $(BIN)/python ci/dist.py

.stamp-venv: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	@$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); q = p['project']; \
	  print(*p['build-system']['requires'], *q['dependencies'], *q['optional-dependencies']['dev'], sep='\n')" > $@.txt
	$(BIN)/python -m pip install -q -r $@.txt
	touch $@

.stamp-build: .stamp-venv $(SOURCES)
	@echo "building (a minute or two)"
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv .stamp-* build dist *.egg-info
	find ulnet/kernelshim/ ulnet/stack/ -name '*.so' -delete -o -name '*.c' -delete
