# Each target makes the environment that it needs first. CORES limits what a run may use.
PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin

.PHONY: demo test lint ui docs clean

demo: .venv/ready
	$(BIN)/snakemake --cores $(CORES)
	@$(BIN)/coppice summary --results results/demo

test: .venv/ready
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/python -m coppice.documentation --check

ui: .venv/ready
	$(BIN)/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///results/mlflow.db

docs: .venv/ready
	$(BIN)/python -m coppice.documentation

clean:
	rm -rf results/demo results/mlflow.db results/mlartifacts .snakemake

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch .venv/ready
