# Every target makes what it needs, works offline after installation and may be run again.
#   make demo                 many effect LoRAs -> one few-step LoRA, on the embedded nano base
#   make demo BUDGET=full     the headline run: eight effects;  PROCESSES=1 does it on one core (default: two where there are)
#   make test                 proves that it works;  make test-all adds what takes long
#   make docs                 these notebooks as a site with search, _docs/index.html
# PYTHON=... chooses the interpreter; KEEP_TORCH=1 keeps the torch it has; EXTRAS=dev,eval installs more.
SHELL := bash
BUDGET ?= demo
SEED ?= 0
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PROCESSES ?= $(shell [ "$$(nproc 2>/dev/null || echo 1)" -gt 1 ] && echo 2 || echo 1)
BIN := .venv/bin
QUIET := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MPLBACKEND=agg TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
LINT := E9,F401,F63,F7,F81,F82

export PYTHON KEEP_TORCH EXTRAS
.PHONY: help install demo test test-all export-check lint notebooks pytest readme docs rebase export clean

help:
	@sed -n '2,6p' Makefile

install:
	@bash tools/install.sh

demo: install
	$(QUIET) $(BIN)/collectionlora demo --budget $(BUDGET) --seed $(SEED) --processes $(PROCESSES)

test: install export-check lint notebooks pytest

test-all: test
	$(QUIET) timeout 7200 $(BIN)/python -m pytest -q -m slow tests

export-check: install
	$(BIN)/python tools/check_export.py

lint: install
	$(BIN)/ruff check --isolated --target-version py310 --select $(LINT) collectionlora tools tests setup.py
	$(BIN)/python tools/style.py

notebooks: install
	$(QUIET) OMP_NUM_THREADS=1 timeout 1800 $(BIN)/nbdev_test --n_workers $(WORKERS) --timing

pytest: install
	$(QUIET) timeout 1500 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile tests

export: install
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: install
	$(QUIET) $(BIN)/python tools/readme.py --run

docs: install
	EXTRAS=dev,docs bash tools/install.sh
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file tools/mkdocs.yml

rebase: install
	$(QUIET) $(BIN)/collectionlora rebase --seed $(SEED)

clean:
	rm -rf build dist _docs _proc *.egg-info .pytest_cache .ruff_cache .hypothesis results/scratch
	find collectionlora nbs tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
