# Everything one does twice. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS := .venv/.installed-docs
OLDEST := .venv-oldest
PARALLEL := -n auto --dist loadscope --maxprocesses 8  # tests of a class or file share what they prepared

.PHONY: env demo test test-all test-wheel test-oldest lint format bench gpu docs clean

env: $(STAMP)

$(STAMP): requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.x ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: env
	$(BIN)/python scripts/demo.py

test: env
	$(BIN)/python -m pytest $(PARALLEL)

test-all: env
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

test-wheel: env  # the wheel, installed, in an empty folder: the quick demo and the evaluator
	$(BIN)/python -m pytest tests/test_install.py -m slow

test-oldest: $(OLDEST)/.installed  # the oldest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest $(PARALLEL)

$(OLDEST)/.installed: requirements-oldest.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: env
	$(BIN)/python benchmarks/run.py

gpu: env
	$(BIN)/python benchmarks/gpu.py

$(DOCS): $(STAMP) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

docs: $(DOCS)
	$(BIN)/python docs/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean:
	rm -rf .venv $(OLDEST) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
