# `make demo` and `make test` set up .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
OLDEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,contract config validation collators contexts heads scoring sharing teacher trl_surface card))
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Tiny models: a second thread costs more in barriers than it saves.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-oldest lint build docs benchmark clean

demo: .venv/ready
	$(BIN)/trl-opsd demo

test: .venv/ready lint
	$(BIN)/python -m pytest -q

# The fast tests that touch TRL, on the oldest versions that pyproject.toml allows.
test-oldest: .venv-oldest/ready
	$(OLDEST)/python -m pytest -q $(OLDEST_TESTS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

build: .venv/ready
	$(BIN)/python -m build

# README, docs/ and the API's reference as a static site in outputs/site.
docs: .venv/ready
	$(BIN)/python docs/build_site.py outputs/site

benchmark: .venv/ready
	$(BIN)/python benchmarks/loss_head.py

clean:
	rm -rf .venv .venv-oldest build dist outputs *.egg-info

# torch first and alone, so that a pinned build already chosen is not replaced by a dependency's wish.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/pip install -q -c constraints-oldest.txt torch
	$(OLDEST)/pip install -q -c constraints-oldest.txt -e . pytest rich
	touch $@
