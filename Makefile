# `make demo` and `make test` set up .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
NEWEST := .venv-newest/bin
VLLM := .venv-vllm/bin
DOCS := .venv-docs/bin
OLDEST_TESTS := $(addprefix tests/,methods/test_contract.py trainers/test_config.py rows/test_validation.py teacher model trl_seam trainers/test_vllm_boundary.py card/test_card.py trainers/test_waits.py trainers/test_offload.py)
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Tiny models: a second thread costs more in barriers than it saves.
export OMP_NUM_THREADS ?= 1
# Processes that tests are shared out to, a file at a time.
WORKERS ?= 2
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: demo smollm2 test test-all test-oldest test-newest test-real test-vllm test-browser matrix lint build docs benchmark clean

demo: .venv/ready
	$(BIN)/trl-opsd demo

test: .venv/ready lint
	$(BIN)/python $(PYTEST)

# Beside these, every engine, fault and setting: most of an hour on 2 cores.
test-all: .venv/ready lint
	$(BIN)/python $(PYTEST) -m "exhaustive or not exhaustive"

# The fast tests that touch TRL, on the oldest versions that pyproject.toml allows.
test-oldest: .venv-oldest/ready
	$(OLDEST)/python $(PYTEST) $(OLDEST_TESTS)

# The same on the newest of everything that pip finds, torch alone excepted: later ones have no build without CUDA on PyPI.
test-newest: .venv-newest/ready
	$(NEWEST)/python $(PYTEST) $(OLDEST_TESTS)

# A pretrained model, problems and tokenizers that package registries hold, notebooks and the site; what cannot be had is
# skipped by name.
test-real: .venv/real
	TEST_REAL=1 TRITON_INTERPRET=1 $(BIN)/python $(PYTEST) tests/real

# SmolLM2-135M-Instruct as a model folder.
smollm2: .venv/real
	$(BIN)/python -m trl_opsd.demo.smollm2 outputs/smollm2

# The trainers over a real vLLM engine on CPU; optional, needs a processor with AVX-512 (docs/vllm.md). vLLM and what it
# imports warn freely, so here warnings are no errors.
test-vllm: .venv-vllm/ready
	$(VLLM)/python -m pytest -q -W default tests/vllm_engine

# The inspector's page in a headless Chromium, which must be installed (Debian: apt-get install chromium-driver).
test-browser: .venv/ready
	REQUIRE_BROWSER=1 $(BIN)/python -m pytest -q tests/inspect/test_browser.py

# Every cell of docs/distributed.md on this machine's CPU; writes the page's table.
matrix: .venv/ready
	$(BIN)/python tests/support/matrix.py --write docs/distributed.md

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

build: .venv/ready
	$(BIN)/python -m build

# README, docs/ and the API's reference as a static site in outputs/site; a link that leads nowhere is an error.
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict

benchmark: .venv/ready
	$(BIN)/python benchmarks/loss_head.py

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm .venv-docs build dist outputs *.egg-info

# torch first and alone, so that a pinned build already chosen is not replaced by a dependency's wish.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Where a package cannot be had, the tests say so. inspect-ai asks for an older fsspec than the constraints name.
.venv/real: .venv/ready
	-$(BIN)/pip install -q -c constraints.txt gguf nbclient ipykernel
	-$(BIN)/pip install -q --no-deps bitsandbytes==0.50.2
	-$(BIN)/pip install -q -c constraints.txt tensorboard wandb
	-$(BIN)/pip install -q --no-deps champ-dataset==1.0.0
	-$(BIN)/pip install -q -c constraints.txt sentence-transformers
	-$(BIN)/pip install -q -c constraints.txt fastapi uvicorn openai
	-$(BIN)/pip install -q triton==3.5.1
	-$(BIN)/pip install -q inspect-ai==0.3.285
	-$(MAKE) .venv-docs/ready
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/pip install -q -c constraints-oldest.txt torch
	$(OLDEST)/pip install -q -c constraints-oldest.txt -e . pytest pytest-xdist rich
	touch $@

# The list is whole, so nothing is resolved: vLLM's own metadata asks for more than it needs here.
.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/pip install -q -c constraints.txt torch
	$(NEWEST)/pip install -q -e . pytest pytest-xdist rich
	touch $@

# The reference is read from the source, so neither torch nor TRL is needed.
.venv-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/pip install -q -c constraints.txt mkdocs-material mkdocstrings-python mike
	touch $@

.venv-vllm/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install -q --no-deps -r constraints-vllm.txt
	$(VLLM)/pip install -q --no-deps -e .
	touch $@
