# From a fresh clone, with Python 3.11 and make:  make demo   or   make test.
# The first call builds .venv from the pinned constraints; later calls start at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := demo,images,compiled,deploy,dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help venv test demo bench docs check

help:
	@echo "make venv                       build .venv"
	@echo "make demo                       train a small network on real digits and compress it"
	@echo "make test [ARGS=...]            the whole test suite"
	@echo "make check                      format, lint, types, fast tests"
	@echo "make bench NAME=... [ARGS=...]  run benchmarks/NAME.py"
	@echo "make docs                       write the generated pages and tables again"

venv: $(STAMP)
	@:

# torch goes first and alone: nothing that follows may choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "espalier needs Python 3.11 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "building $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e ".[$(EXTRAS)]"
	@touch $@

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto $(ARGS)

demo: $(STAMP)
	$(BIN)/espalier demo --out runs/demo

bench: $(STAMP)
	@test -f "benchmarks/$(NAME).py" || { echo "make bench NAME=... [ARGS=...]; there is:" $(filter-out common,$(sort $(basename $(notdir $(wildcard benchmarks/*.py))))) >&2; exit 2; }
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

docs: $(STAMP)
	$(BIN)/python scripts/generate

check: $(STAMP)
	scripts/check
