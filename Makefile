# pathfed: what people run. `make demo` and `make test` need nothing but Python 3.11 to 3.13 and a network that reaches a package index.
#
#   make demo                 a consortium of one server and three hospital sites on this machine
#   make demo SLIDES=DIR      the same on your folders DIR/<hospital>/slides/* and DIR/<hospital>/patients.csv
#   make test                 every test
#   make chaos                kills at every phase of a round, lines that fail, hostile sites, full disks, absent databases; two to three hours
#   make bench                the benchmarks, some minutes each; BENCH_ARGS=--quick for a first look
#   make lint                 formatting, style, types, import contracts
#   make docs                 the documentation, into site/
#   make check                lint, docs and test
#   make protocol             the protobuf messages, from common/pathfed_common/protocol/*.proto
#
# Settings of chaos: SEED=1 (other cases)  TIMES=3 (in a row)  ROUNDS=10  CHAOS=short (each kind of process once)
# Settings: PYTHON=python3.12  ARGS='--rounds 5' (more options for the demo)  T='tests/client -k ledger' (which tests)
#           PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' (a CPU build of torch where the index would give a CUDA one)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# A test file runs in one process from its first test to its last; two files run beside each other (tests/conftest.py).
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo bench test chaos lint format docs reference protocol check clean distclean

help:
	@sed -n 's/^#  *\(make .*\)/  \1/p' Makefile

demo: $(VENV)/.installed
	@$(BIN)/pathfed demo $(if $(SLIDES),--slides '$(SLIDES)') $(ARGS)

test: $(VENV)/.installed-dev
	@$(PYTEST) $(T)

# Several times in a row, each with the next seed; the first failure ends it.
SEED ?= 0
TIMES ?= 1
ROUNDS ?= 0
CHAOS ?= full
# Tests that try every write of a round or of a run here, and some of them in the ordinary run.
SWEEPS := tests/client/test_power_loss.py tests/client/test_full_disk.py tests/server/rounds/test_full_disk.py

chaos: $(VENV)/.installed-dev
	@for seed in $$(seq $(SEED) $$(($(SEED) + $(TIMES) - 1))); do \
		echo "chaos, seed $$seed"; \
		CHAOS=$(CHAOS) SEED=$$seed ROUNDS=$(ROUNDS) $(BIN)/pytest -n 0 -q tests/chaos $(SWEEPS); done

bench: $(VENV)/.installed-dev
	@for script in round_overhead demo_time enrol recovery scan tile_reading tile_stream slow_mount noise accounting private_step scale provenance bulk_transfer aggregation_memory simulation wire_formats; do $(BIN)/python tests/benchmarks/$$script.py $(BENCH_ARGS); done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Pages made from the code: error pages, command reference, plan reference.
reference: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

# The installation makes them as well; this is for whoever edits a .proto file.
protocol: $(VENV)/.installed-dev
	$(BIN)/python common/build_protocol.py

check: lint docs test

clean:
	rm -rf site dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find client common deploy docs server tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# The virtual environment, made once and made again when what it holds changes. The demo needs less than the tests.
$(VENV)/.installed: pyproject.toml constraints.txt common/pathfed_common/protocol/control.proto
	@test -n '$(PYTHON)' || { echo 'pathfed needs Python 3.11, 3.12 or 3.13; name one with make PYTHON=/path/to/python3.11' >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing pathfed into $(VENV) (some minutes the first time)'
	@$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[client,server,demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo 'installing what the tests need'
	@$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[client,server,demo,dev]'
	@touch $@
