# make run    serve the built-in echo in the foreground
# make test   install what the tests need, and run them
# make lint   ruff and mypy
# make soak   the long runs
# make bench  forkd's CPU time beside asyncio's and uvloop's; how long a killed worker is missed; what deadlines cost;
#             how good clients fare beside bad ones
# Each makes its own virtual environment first; nothing else is needed but Python 3.11 or later.

# The system's Python comes first where it will do: distributions build it with profile-guided optimization, and forkd
# then serves with about a quarter less CPU than on one that was compiled without. PYTHON=... chooses another.
PYTHON ?= $(shell for python in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: run test soak lint bench completions clean

run: $(VENV)/run
	@echo "forkd serves an echo. In another terminal:  nc 127.0.0.1 7007"
	@echo "Type a line and see it come back. Ctrl-C here stops the server."
	@exec $(BIN)/forkd run --workers 2

test: $(VENV)/test
	$(BIN)/python -m pytest -m "not soak" $(ARGS)

soak: $(VENV)/test
	$(BIN)/python -m pytest -m soak $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench
	$(BIN)/python bench/compare.py $(ARGS)
	$(BIN)/python bench/compare.py --fresh --clients 20 $(ARGS)
	$(BIN)/python bench/replace.py
	$(BIN)/python bench/deadlines.py
	$(BIN)/python bench/crowd.py

completions: $(VENV)/test
	@mkdir -p build/completions
	@for shell in bash zsh fish; do $(BIN)/forkd completion $$shell >build/completions/forkd.$$shell; done

clean:
	rm -rf .venv* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "forkd needs Python 3.11 or later, with its venv module (on Debian: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run: pyproject.toml | $(VENV)/bin/python
	@$(PIP) --editable .
	@touch $@

$(VENV)/test: pyproject.toml | $(VENV)/bin/python
	@$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/run

$(VENV)/bench: pyproject.toml | $(VENV)/bin/python
	@$(PIP) --editable '.[bench]'
	@touch $@ $(VENV)/run

$(VENV)/dev: pyproject.toml | $(VENV)/bin/python
	@$(PIP) --editable '.[test,dev]'
	@touch $@ $(VENV)/test $(VENV)/run
