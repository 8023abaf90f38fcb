# make demo   the whole study on this machine, then its table
# make paper  every table and figure of the paper at laptop scale; hours, resumable
# make test   all tests but those that need a SLURM
# make test-slurm   those: a cluster of emulated nodes on this machine, which needs root
# make test-gpu   those that a CUDA device runs; skipped without one
# make docs   the docs site
# make ui     browse the results in MLflow
# PYTHON=python3.12 make …  chooses the interpreter that .venv is made with

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: help demo paper test test-slurm test-gpu lint hooks docs ui clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"egrpo needs Python 3.11 to 3.13, $(PYTHON) is {v[0]}.{v[1]}: PYTHON=python3.12 make …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# progress; paths, reasons and commands are in the log whose name comes last
QUIET := --quiet host reason rules

demo: .venv/ready ## the default study: profile, plan, training, evaluation, table
	snakemake --cores all $(QUIET)
	egrpo report

paper: .venv/ready ## every table and figure of the paper, at laptop scale; resumable
	snakemake --cores all $(QUIET) paper

# a file is one worker's; the longest ones first
test: .venv/ready ## all tests but those that need a SLURM
	python -m pytest -m "not slurm" -n 2 --dist loadfile tests/test_workflow_paper.py tests/test_workflow.py tests

test-slurm: .venv/ready ## the workflow on a real SLURM: emulated nodes on this machine, needs root
	python -m pytest -m slurm -rs

test-gpu: .venv/ready ## what only a CUDA device can show; skipped, with the reason, without one
	python -m pytest -m gpu -rs tests/test_gpu.py

lint: .venv/ready ## the linters that .ci/run runs
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint

hooks: .venv/ready ## have git run the linters before each commit
	pre-commit install

docs: .venv/ready ## build the docs site; needs no network
	python -m sphinx -E -W -n --keep-going -q docs docs/_build/html
	@echo docs/_build/html/index.html

ui: .venv/ready ## browse the results in MLflow, on 127.0.0.1
	@egrpo ui

clean: ## remove all results
	rm -rf results/* .snakemake
	git checkout -q -- results 2>/dev/null || true
