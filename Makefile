# make demo   install into .venv, then match two of the built-in photos
# make test   install with the development tools, then run every test that needs no network, GPU or outside file, a
#             process per core; those that drive a browser are skipped where there is no Chromium
# make check  lint, types, tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install --constraint constraints.txt
SETUP  := pyproject.toml constraints.txt

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(BIN)/hf-equiv match builtin

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

# The stamps lie inside the environment: whoever removes it removes them too.
$(VENV)/.installed: $(SETUP) | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(SETUP) | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_equiv needs Python 3.11 or later; " \
	  "got %d.%d. Run make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache
