# make run    serve the built-in echo in the foreground
# make test   install what the tests need, and run them, several at a time; ARGS goes to pytest (ARGS="-k reload -n0")
# make lint   ruff and mypy
# make soak   the long runs; FORKD_SOAK_SECONDS=60 and FORKD_SOAK_SEED=7 are for the one that does anything at random
# make fuzz   whatever strangers may send, at random, for FORKD_FUZZ_SECONDS (600); what has failed is kept in .fuzz/,
#             or in FORKD_FUZZ_DATABASE, and tried first the next time
# make sanitize  the contract suites over the compiled twin, with assertions, AddressSanitizer and LeakSanitizer
# make docs   the pages of docs/ as a site in site/; a dead link fails it
# make pictures  the pictures of the status page and of `forkd top` in docs/pictures, of an example (needs chromium)
# make coverage  how much of forkd/ the tests run, over all processes; ARGS as for `make test`
# make bench  what a request costs beside C and other servers, in ten minutes, into docs/benchmarks.md and its plots
# make bench-quick  the same of the nearest ones, in a minute, printed
# make bench-rest  how long a killed worker is missed; what deadlines cost; what clients wait for beside those that make much
#             work; how good clients fare beside bad ones; what a scrape costs
# make guard  how many instructions a request and a connection take, against bench/guard.json (needs valgrind);
#             `make guard-renew` writes that file
# make wheel  two wheels in dist/: one for this machine's Python and platform, with the compiled twin of the hot path, and
#             one for all, which has Python's twin alone
# Each makes its own virtual environment first; nothing else is needed but Python 3.11 or later.

# The system's Python comes first where it will do: distributions build it with profile-guided optimization, and forkd
# then serves with about a quarter less CPU than on one that was compiled without. PYTHON=... chooses another.
PYTHON ?= $(shell for python in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
VENV ?= .venv
BIN := $(VENV)/bin
# Tests that run at the same time: two for each core, since many wait for a daemon to do something.
JOBS ?= $(shell expr 2 '*' $$(nproc))
# What an installation is made of: it is made again when one of these changes.
BUILT_OF := pyproject.toml setup.py forkd/__init__.py $(shell find forkd -name '_fast.pyx')
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: run test soak fuzz sanitize lint docs pictures coverage bench bench-quick bench-rest guard guard-renew completions wheel clean

run: $(VENV)/run
	@echo "forkd serves an echo. In another terminal:  nc 127.0.0.1 7007"
	@echo "Type a line and see it come back. Ctrl-C here stops the server."
	@echo "This is $$($(BIN)/forkd --version). The command is $(BIN)/forkd; README.md says how to have it on the PATH, or installed."
	@exec $(BIN)/forkd run --workers 2

# What the tests start would compile all modules each time, where Python is told to keep no bytecode.
test: $(VENV)/test
	@$(BIN)/python -m compileall -q forkd
	$(BIN)/python -m pytest -m "not soak" -n $(JOBS) --dist loadgroup $(ARGS)

soak: $(VENV)/test
	$(BIN)/python -m pytest -m soak -s $(ARGS)

export FORKD_FUZZ_DATABASE ?= $(CURDIR)/.fuzz

fuzz: $(VENV)/test
	$(BIN)/python -m pytest -m soak -s tests/test_fuzz.py $(ARGS)

# In a copy, so that the extensions of the checkout stay what they are.
SANITIZED := build/sanitized
sanitize: $(VENV)/test
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	@cp -r forkd tests etc systemd setup.py pyproject.toml README.md $(SANITIZED)
	@find $(SANITIZED) -name '*.so' -delete
	cd $(SANITIZED) && FORKD_SANITIZE=1 $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD=$$($${CC:-cc} -print-file-name=libasan.so) PYTHONMALLOC=malloc PYTHONPATH=$$PWD \
	LSAN_OPTIONS=print_suppressions=0:suppressions=$$PWD/tests/support/leaks_of_others.txt \
	$(abspath $(BIN))/python -m pytest -n0 --capture=sys -k "not pure and not asyncio" tests/serve/test_fast.py \
	tests/serve/test_loop_rounds.py tests/serve/stream/test_transport*.py tests/serve/datagram/test_transport.py \
	tests/serve/accept/test_acceptor.py tests/serve/accept/test_limits.py tests/system/test_shared_counters.py $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "the pages are in site/index.html"

pictures: $(VENV)/test
	@$(BIN)/python -m tests.support.pictures docs/pictures

# Workers of another user write their part of it too. The table is printed also where a test has failed.
coverage: $(VENV)/coverage
	@rm -rf .coverage-data && mkdir -m 1777 .coverage-data
	$(BIN)/coverage run -m pytest -m "not soak" -n $(JOBS) --dist loadgroup $(ARGS); status=$$?; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $$status

# Perl's Net::Server::PreFork and socat are the system's (on Debian: apt install libnet-server-perl socat).
bench: $(VENV)/bench build/bench/load build/bench/floor
	$(BIN)/python bench/figures.py --docs docs --json build/bench/figures.json $(ARGS)

bench-quick: $(VENV)/bench build/bench/load build/bench/floor
	$(BIN)/python bench/figures.py --quick $(ARGS)

bench-rest: $(VENV)/bench
	$(BIN)/python bench/replace.py
	$(BIN)/python bench/deadlines.py
	$(BIN)/python bench/fairness.py
	$(BIN)/python bench/bad_clients.py
	$(BIN)/python bench/admin.py

build/bench/%: bench/%.c
	@mkdir -p build/bench
	$${CC:-cc} -O2 -Wall -Wextra -o $@ $<

guard: $(VENV)/test
	@$(BIN)/python bench/guard.py

guard-renew: $(VENV)/test
	@$(BIN)/python bench/guard.py --renew

completions: $(VENV)/test
	@mkdir -p build/completions
	@for shell in bash zsh fish; do $(BIN)/forkd completion $$shell >build/completions/forkd.$$shell; done

wheel: $(VENV)/dev
	@rm -rf build/lib* dist/*.whl
	$(BIN)/python -m build --wheel
	FORKD_PURE=1 $(BIN)/python -m build --wheel

clean:
	rm -rf .venv* build dist site .coverage-data .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find forkd -name '_fast*.so' -delete

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "forkd needs Python 3.11 or later, with its venv module (on Debian: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run: $(BUILT_OF) | $(VENV)/bin/python
	@$(PIP) --editable .
	@touch $@

$(VENV)/test: $(BUILT_OF) | $(VENV)/bin/python
	@$(PIP) --editable '.[test,interop]'
	@touch $@ $(VENV)/run

$(VENV)/bench: $(BUILT_OF) | $(VENV)/bin/python
	@$(PIP) --editable '.[bench]'
	@touch $@ $(VENV)/run

$(VENV)/docs: $(BUILT_OF) | $(VENV)/bin/python
	@$(PIP) --editable '.[docs]'
	@touch $@ $(VENV)/run

$(VENV)/coverage: $(BUILT_OF) | $(VENV)/bin/python
	@$(PIP) --editable '.[test,interop,coverage]'
	@touch $@ $(VENV)/test $(VENV)/run

$(VENV)/dev: $(BUILT_OF) | $(VENV)/bin/python
	@$(PIP) --editable '.[test,interop,dev]'
	@touch $@ $(VENV)/test $(VENV)/run
