# Every target does its own set-up: a virtual environment with pinned packages, made once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(VENV)/bin/python -m pytest tests --numprocesses 2 --dist loadfile
STAMP  := $(VENV)/.installed
# Stages at a time, one thread each: small models use two cores better side by side than one after the other.
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
# MLflow's page is that of a chat application unless its address says otherwise.
RUNS   := http://127.0.0.1:5000/\#/experiments?workflowType=machine_learning

# Container images often set it; every stage and test process would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo cpu test test-all test-cluster lint format bench mlflow doctor results setup clean help

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

setup: $(STAMP)  ## virtual environment and pinned packages

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; say make PYTHON=/path/to/python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)   ## train the small systems of the demo suite and write their leaderboard: minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/unroll repro report@demo --jobs $(JOBS)
	@echo "The leaderboard: reports/demo/index.html   The runs: make mlflow"

cpu: $(STAMP)    ## reproduce the cpu suite: hours on two cores
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro report@cpu

test: $(STAMP)   ## unit, contract, reference, pipeline and short fault tests
	$(PYTEST) -m 'not slow and not gpu and not cluster'

test-all: $(STAMP) ## everything, learning thresholds and all faults too
	$(PYTEST) -m 'not gpu and not cluster'

# What it needs beside `make setup`: root and Debian's iproute2 (two hosts), slurm-wlm and munge (Slurm); in the environment
# '.[cluster]' (submit) and 'moto[server]' dvc-s3 (object store). What is missing is skipped, with the reason. TRIALS: per
# cent of the full number of kills and stops (20 workers, 10 nodes, ...); all of them take 21 minutes on two cores. Two files at
# a time: a third of each is waiting.
TRIALS ?= 100
test-cluster: $(STAMP) ## faults on a Ray cluster of two nodes, two hosts, Slurm: on a quiet machine
	UNROLL_TRIALS=$(TRIALS) $(PYTEST) -m cluster -rsP --durations=12

test-gpu: $(STAMP) ## on a machine with a GPU: every recipe's twin trains, goes on after a stop, is scored
	$(PYTEST) -m gpu

lint: $(STAMP)   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## speed and memory, as ratios within one run
	$(BIN)/python benchmarks/run_all.py

mlflow: $(STAMP) ## the runs in a browser, on 127.0.0.1:5000
	@echo "The runs: $(RUNS)   (Model training at the top left, if the page speaks of traces)"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --artifacts-destination ./mlartifacts --host 127.0.0.1 --port 5000

doctor: $(STAMP) ## is this machine ready?
	$(BIN)/unroll doctor

results: $(STAMP) ## write docs/results.md and the README's table
	$(BIN)/unroll results

clean:           ## remove what was computed here; keeps data/downloads
	rm -rf data/prepared models histories predictions evaluations reports runs mlflow.db mlflow.db.lock mlartifacts
