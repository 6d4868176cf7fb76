# `make` lists the targets. Everything is installed into .venv/ in this folder and nothing outside of it.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quantized lint docs-check clean FORCE

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## build .venv/ with every dependency (another interpreter: PYTHON=python3.12)

demo: $(READY) ## run the guided demonstration
	$(VENV)/bin/dynadepth demo

test: $(READY) ## run the tests on two workers (WORKERS=0: in one process; ARGS: anything for pytest)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-quantized: $(READY) ## the tests that need torchao, which is put into build/ for them
	@[ -d build/torchao ] || $(PY) -m pip install -qq -c constraints.txt --no-deps --target build/torchao torchao
	PYTHONPATH=build/torchao $(PY) -m pytest tests/compiled/test_torchao.py

lint: $(READY) ## style, format, types, and who may import whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

docs-check: $(READY) ## links, paths, code blocks and command-line options in the documents
	$(PY) docs/check.py

clean: ## remove builds, caches and the demo's output (not .venv/)
	rm -rf build dist demo-output .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last and holds this folder's path: a build that was cut short, or a checkout that was moved or
# copied with its .venv/, is set up again. The same path in pip's own answer tells whether the scripts can be kept.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(READY): FORCE
endif

$(READY): pyproject.toml constraints.txt
	@rm -f $(READY)
	@$(VENV)/bin/pip --version 2>/dev/null | grep -qF '$(CURDIR)/$(VENV)/' || { \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	    echo "dynadepth needs Python 3.10 to 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing). Try: make setup PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' has no venv module: install it (Debian and Ubuntu: python3-venv) and run make setup again" >&2; exit 1; }; \
	  echo "creating $(VENV)/ with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing torch (large, once)"
	@$(PY) -m pip install -qq -c constraints.txt torch hatchling
	@echo "installing dynadepth and the other dependencies"
	@$(PY) -m pip install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	@printf '%s\n' '$(CURDIR)' > $(READY)
	@echo "ready: $(VENV)/bin/dynadepth"
