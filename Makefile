# Every target makes .venv when it is missing or when pyproject.toml or the constraints changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test test-all test-gpu lint docs bench bench-gpu clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[models,service,test,docs]'
	touch $@

demo: $(STAMP)  ## the tour: generate, tamper, detect, report (about a minute)
	$(BIN)/assay demo

test: $(STAMP) lint  ## every test but the slow Monte-Carlo ones
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(STAMP) lint
	$(BIN)/python -m pytest -q -n 2

test-gpu: $(STAMP)  ## the Triton kernels on the card, where there is one
	$(BIN)/python -m pytest -q tests/kernels

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation site, into site/; warnings are errors
	$(BIN)/mkdocs build --strict

bench: $(STAMP)  ## CPU benchmarks; each prints ratios measured in one run
	$(BIN)/python benchmarks/detection.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/scoring_cpu.py
	$(BIN)/python benchmarks/corpus_scoring.py
	$(BIN)/python benchmarks/ump_tokens.py
	$(BIN)/python benchmarks/null_laws.py
	$(BIN)/python benchmarks/profiles.py
	$(BIN)/python benchmarks/tilted_sampling.py
	$(BIN)/python benchmarks/tokens_to_detect.py
	$(BIN)/python benchmarks/zero_shot_identity.py
	$(BIN)/python benchmarks/zero_shot_speed.py

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu_scoring.py
	$(BIN)/python benchmarks/gpu_sampling.py

clean:
	rm -rf $(VENV) site build dist *.egg-info
