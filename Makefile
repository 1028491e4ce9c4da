# Every chore of the project. `make venv` is the only one that needs the network.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.ready-bench
DEMO := demo

.DEFAULT_GOAL := help
.PHONY: help venv demo test cluster slow faults lint format bench ui constraints clean

help: ## Show what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(READY) ## Make .venv with the exact versions of constraints.txt

# uv installs the 190 packages in seconds where pip takes minutes; without it, pip does the same.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
		&& $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' \
		|| $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY) $(DEMO)/raw/NOTICE.txt ## Synthetic images -> shards -> sweep -> leaderboard, all under demo/
	$(BIN)/python -m ssn ingest synthetic_surfaces --raw $(DEMO)/raw --out $(DEMO)/shards
	$(BIN)/python -m tuning sweep synthetic_surfaces --data $(DEMO)/shards --config demo.yaml \
		--tracking-uri sqlite:///$(DEMO)/mlflow.db --out $(DEMO)/runs --json $(DEMO)/leaderboard.json

$(DEMO)/raw/NOTICE.txt: | $(READY)
	rm -rf $(DEMO)/raw
	$(BIN)/python -m ssn demo-data --out $(DEMO)/raw

test: $(READY) ## Run the tests but the slow ones; those whose data is not there are skipped and say so
	$(BIN)/python -m pytest

cluster: $(READY) ## Run a sweep as a Ray job, against an object store, an MLflow server and a cluster of its own
	$(BIN)/python -m pytest -m "cluster and not slow"

slow: $(READY) ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow -s

faults: $(READY) ## Kill a sweep's processes, lock and damage its files, and print what each fault cost
	$(BIN)/python -m tests.integration.faults

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# anomalib and its dependencies fit into the same environment: they leave every version of constraints.txt as it is
$(BENCH_READY): $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev,bench]' \
		|| $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

bench: $(BENCH_READY) ## Compare speed and memory with anomalib's implementation: hours; BENCH="--only infer" for a part
	$(BIN)/python -m tests.benchmarks.peer $(BENCH)

ui: $(READY) ## Show the demo's runs and models in a browser
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(DEMO)/mlflow.db

constraints: $(READY) ## Resolve constraints.txt anew from pyproject.toml
	$(BIN)/uv pip compile --upgrade --no-header --no-emit-index-url --no-annotate --all-extras \
		--python-version 3.11 pyproject.toml -o constraints.txt

clean: ## Remove what the other targets wrote, .venv included
	rm -rf $(DEMO) runs mlruns mlflow.db build dist .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find ssn tuning tests -name __pycache__ -type d -prune -exec rm -rf {} +
