# make quickstart   installs into .venv, trains configs/quickstart.py and says where the report is
# make test         installs into .venv and runs the tests that take minutes: 10 on two cores
# make test-all     the slow ones, too, and more examples of the random ones: half an hour
# make lint         style, spelling, types
# make lock         takes the newest packages into constraints.txt, which every installation goes by
# make clean        removes .venv and caches, never a run
#
# PYTHON=python3.12 picks another interpreter (3.11 or newer); .venv is made again when it changes. LOCK= takes the
# newest packages that pyproject.toml allows instead of the pinned ones.

PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check
INSTALLED := .venv/installed-$(VERSION)
TEST_INSTALLED := .venv/test-installed-$(VERSION)
RUN := runs/quickstart
# A worker needs a core and 3 GB of memory: make test WORKERS=8
WORKERS ?= 2
PYTEST_ARGS ?=
LOCK ?= constraints.txt
PINNED := $(if $(LOCK),--constraint $(LOCK))
PYTEST = .venv/bin/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal --strict-skips $(PYTEST_ARGS)

.PHONY: help quickstart test test-all lint lock clean python
.DELETE_ON_ERROR:

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

quickstart: $(INSTALLED)
	.venv/bin/opendeep train --config=configs/quickstart.py --workdir=$(RUN)
	@echo "Report: $(CURDIR)/$(RUN)/report.html"

test: $(TEST_INSTALLED)
	$(PYTEST)

test-all: $(TEST_INSTALLED)
	$(PYTEST) -m '' --hypothesis-profile=all

lint: $(TEST_INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/codespell
	.venv/bin/pyrefly check
	.venv/bin/python tests/mutations.py --check

# Pins of every package that the extras take, for all Python versions.
lock: $(TEST_INSTALLED)
	@$(PIP) install uv
	.venv/bin/uv pip compile --universal --python-version 3.11 --upgrade --all-extras --no-annotate \
	--custom-compile-command 'make lock' --output-file $(LOCK) pyproject.toml

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# An interpreter that is missing or too old is refused before anything is made.
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "$(PYTHON) is missing, or older than Python 3.11. Give another one: make PYTHON=python3.12 ..." >&2; exit 2; }

$(INSTALLED): pyproject.toml $(LOCK) | python
	@[ "$$(.venv/bin/python -c 'import platform; print(platform.python_version())' 2>/dev/null)" = "$(VERSION)" ] \
	|| { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo "Installing OpenDeep into .venv (Python $(VERSION)) ..."
	@$(PIP) install $(PINNED) --editable .
	@touch $@

$(TEST_INSTALLED): $(INSTALLED)
	@echo "Installing what the tests need ..."
	@$(PIP) install $(PINNED) --editable '.[test]'
	@touch $@
