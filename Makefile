# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train demo docs docs-serve test quick test-minimum experiments bags forecasts speed stale lint types suite format tables release clean

# One thread: two would mostly wait for each other in so small a model.
train: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python training/train.py configs/vit_digits.yaml --output_dir runs/vit_digits --overwrite

demo: $(READY)
	$(BIN)/python space/app.py

RETRIEVAL := $(wildcard configs/retrieval/*_digits.yaml)
GEOMETRY := $(filter-out %_mnist.yaml %_cifar10.yaml,$(wildcard configs/geometry/*.yaml))

experiments: $(READY)
	for recipe in $(RETRIEVAL); do $(BIN)/python training/train.py $$recipe || exit 1; done
	for recipe in $(GEOMETRY); do $(BIN)/python training/train.py $$recipe || exit 1; done

# Folder with the data sets of the recipes, each a file of its name: tiger.parquet, ETTh1.csv, ...
DATA ?= data

bags: $(READY)
	$(BIN)/modeling-uhop sweep configs/sweeps/mil.yaml --data_dir $(DATA)

forecasts: $(READY)
	$(BIN)/modeling-uhop sweep configs/sweeps/stanhop.yaml --data_dir $(DATA) --jobs 2

speed: $(READY)
	$(BIN)/python benchmarks/run.py

# The results files whose code has changed since they were made.
stale: $(READY)
	$(BIN)/python -m modeling_uhop.training.stale

test: lint types suite

# In two minutes: without the tests that train for seconds or start a process.
quick: lint types
	$(BIN)/python -m pytest -m unit -n 2 --dist worksteal

# The tests again, with the lowest version that pyproject.toml declares of each package.
MINIMUM := .venv-minimum
test-minimum: $(MINIMUM)/constraints.txt
	$(MAKE) suite VENV=$(MINIMUM) CONSTRAINTS=$(MINIMUM)/constraints.txt

$(MINIMUM)/constraints.txt: pyproject.toml
	mkdir -p $(MINIMUM)
	grep -oE '[A-Za-z-]+>=[0-9.]+' pyproject.toml | sed 's/>=/==/' | sort -u > $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# DeepSpeed stands in a folder of its own, from which only its tests import it.
DEEPSPEED := $(VENV)/.deepspeed
$(DEEPSPEED): constraints.txt | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --no-deps --upgrade \
		--target $(VENV)/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo || echo "DeepSpeed could not be installed"
	touch $@

suite: $(READY) $(DEEPSPEED)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 10

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml $(CONSTRAINTS) modeling_uhop/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[train,dev]'
	touch $(READY)

# The documentation, in site/index.html; a warning fails the build.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

tables: $(READY)
	$(BIN)/python -m modeling_uhop.training.report.document

# A tag such as v0.2.0 makes .github/workflows/release.yml do the same, and publish it.
release: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) $(MINIMUM) runs build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
