# `make` lists the targets. Everything runs in .venv, which is made when first needed.
SHELL := bash
VENV := .venv
PY := $(VENV)/bin/python
CUDA_PLUGIN := $(VENV)/cuda-plugin
# Bytecode is kept, whatever the environment says: to compile an import takes longer than to run it.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help venv cuda-plugin demo test test-slow prove fuzz lint format docs docs-check bench pins clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# Two stamps: new pins reinstall the requirements, a new pyproject.toml only the package itself.
$(VENV)/.requirements: requirements/dev.txt requirements/uv.txt scripts/make_venv.sh
	@scripts/make_venv.sh $(VENV) requirements/dev.txt
	@touch $@

$(VENV)/.moeconv: $(VENV)/.requirements pyproject.toml
	@$(PY) -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation --no-index -e .
	@touch $@

venv: $(VENV)/.moeconv ## .venv: pinned requirements (hashes checked) and moeconv itself

$(CUDA_PLUGIN)/.pinned: $(VENV)/.requirements requirements/cuda-plugin.txt scripts/cuda_plugin.sh
	@scripts/cuda_plugin.sh $(PY) $(CUDA_PLUGIN)
	@mkdir -p $(CUDA_PLUGIN) && touch $@

cuda-plugin: venv $(CUDA_PLUGIN)/.pinned ## what compiles for GPUs that are not there (docs/memory.md)

demo: venv ## train a tiny MoE, convert it, prove that it is the same model (under 4 minutes)
	@$(PY) demo/demo.py

test: venv ## the tests of every commit
	@$(PY) -m pytest --numprocesses 2 --dist loadgroup --durations 10

# The longest first, in groups as they are collected; see tests/proof_plugin.py.
SLOW := MOECONV_CUDA_PLUGINS="$$PWD/$(CUDA_PLUGIN)" $(PY) -m pytest --durations 10 \
	--numprocesses 2 --dist loadgroup --no-loadscope-reorder

test-slow: cuda-plugin ## the tests that take minutes, of proofs with a record a sample
	@$(SLOW) -m slow --proofs sample

prove: cuda-plugin ## run all proofs and renew their records (ONLY=stale, or names with commas)
	@$(SLOW) -m proof --proofs "$(or $(ONLY),all)"

fuzz: venv ## the fuzz tests with ten times the examples
	@MOECONV_FUZZ=$${MOECONV_FUZZ:-10} $(PY) -m pytest -m slow tests/fuzz

lint: venv ## ruff, mypy and the limits between packages
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@mkdir -p $(VENV)/types && ln -sfn ../../train $(VENV)/types/moeconv_train
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-logo

format: venv ## let ruff rewrite what it can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

docs: venv ## regenerate docs/mapping.md, docs/cli.md and the tables of families
	@$(PY) tools/docs.py

docs-check: venv ## fail if the generated pages are not what the code says
	@scripts/docs_check.sh $(PY)

bench: cuda-plugin ## every benchmark, one after the other
	@set -e; export MOECONV_CUDA_PLUGINS="$$PWD/$(CUDA_PLUGIN)"; shopt -s nullglob; for bench in benchmarks/[!_]*.py; do echo "== $$bench"; $(PY) "$$bench"; done

pins: venv ## pin the requirements anew (UPGRADE=--upgrade for the newest)
	@UV=$(VENV)/bin/uv scripts/make_pins.sh $(UPGRADE)

clean: ## remove what was made, the venv too
	rm -rf $(VENV) demo-out bench-out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
