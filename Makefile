# approx_attn: `make help` lists what there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRAIN_STAMP := $(VENV)/.installed-training
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
ARGS ?=

# What `make compare` compares; the word TASK=data=digits, for example, takes another task.
TASK ?= experiment=recall
MECHANISMS ?= 'attention=[exact,{name: eigen_cluster, keep: 0.25, cluster_size: 4, block_size: 16, order: 2},eigen_topk,{name: eigen_topk, rest: drop},{name: low_rank_topk, in_training: exact},sliding_window,linear]'

.DEFAULT_GOAL := help
.PHONY: help install compare gpu test test-all lint types format package docs clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## Make the environment and install everything, pinned by constraints.txt

# What training needs, without the tools of development: `make compare` starts sooner.
$(TRAIN_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)
	# torch first and by its exact version, so that no second build of it is fetched.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(STAMP): $(TRAIN_STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,launch,dev,peers]'
	@touch $@

compare: $(TRAIN_STAMP) ## Train seven mechanisms, three seeds each, and print the table (5 minutes; TASK=data=digits: on digits)
	$(BIN)/python scripts/compare.py $(TASK) $(MECHANISMS) 'seeds=[1,2,3]' $(ARGS)

gpu: install ## Check and measure eigen_cluster on a CUDA GPU, into results/gpu (under 8 minutes)
	$(BIN)/python scripts/gpu.py $(ARGS)

test: install lint types ## Lint, types and the fast tests (5 minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: install lint types ## Lint, types and all tests: also killed runs, compilers, whole fuzz (25 minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow" $(ARGS)

lint: install ## Check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## Check types with mypy
	$(BIN)/mypy

format: install ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

package: install ## Build wheel and sdist into dist/ and check each in a fresh environment
	$(BIN)/python scripts/package.py

docs: $(DOCS_STAMP) ## Build the documentation into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean: ## Remove the environment and build products (runs and results stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
