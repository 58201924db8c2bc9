# Each target makes the environment that it needs first. CORES limits what a run may use.
PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin

.PHONY: demo test test-cluster test-services test-browser crosscheck bench-solvers lint ui docs pictures clean

demo: .venv/ready
	$(BIN)/snakemake --cores $(CORES)
	@$(BIN)/coppice summary --results results/demo

test: .venv/ready .venv/storage/ready
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder

test-cluster: .venv/ready .venv/storage/ready .venv/kubernetes/ready
	$(BIN)/python -m pytest tests/cluster

test-services: .venv/ready
	$(BIN)/python -m pytest tests/services

test-browser: .venv/ready
	$(BIN)/python -m pytest tests/browser tests/workflow/test_watch.py

crosscheck: .venv-crosscheck/ready
	.venv-crosscheck/bin/python -m pytest crosscheck

bench-solvers: .venv-crosscheck/ready
	.venv-crosscheck/bin/python benchmarks/solvers.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakemake --lint
	$(BIN)/python -m coppice.documentation --check

ui: results/mlflow.db .venv/ready
	$(BIN)/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///results/mlflow.db

results/mlflow.db:
	@echo "There is no $@ yet, so nothing to show: a study's run makes it, as does make demo." >&2
	@false

docs: .venv/ready
	$(BIN)/python -m coppice.documentation

pictures: .venv/ready
	$(BIN)/python docs/pictures.py
	$(BIN)/python -m docs.mlflow_pictures

clean:
	rm -rf results/demo results/mlflow.db results/mlartifacts .snakemake

# torch by pip, whose settings may name a build of it (for a CPU, say); all else by uv, which is five times as fast.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/python -m pip install --quiet --no-deps $(shell grep '^torch==' requirements.lock)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable . $(addprefix --editable ,$(wildcard contrib/*/))
	touch .venv/ready

.venv/storage/ready: tests/storage-requirements.txt .venv/ready
	$(BIN)/uv pip install --quiet --target .venv/storage --no-deps --requirement tests/storage-requirements.txt
	touch .venv/storage/ready

# The wheels are what an image for pods holds: profiles/kubernetes/Dockerfile.
.venv/kubernetes/ready: tests/kubernetes-requirements.txt .venv/storage/ready
	$(BIN)/uv pip install --quiet --target .venv/kubernetes --no-deps --requirement tests/kubernetes-requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --dest .venv/kubernetes/wheels \
	  $(shell grep -h '^snakemake-storage-plugin' requirements.lock tests/storage-requirements.txt)
	touch .venv/kubernetes/ready

.venv-crosscheck/ready: crosscheck/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-crosscheck
	.venv-crosscheck/bin/python -m pip install --quiet --requirement crosscheck/requirements.txt
	.venv-crosscheck/bin/python -m pip install --quiet --no-deps --editable .
	touch .venv-crosscheck/ready
