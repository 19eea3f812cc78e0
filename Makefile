# Every target sets up what it needs: a virtual environment in .venv, from the pins in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src modeling processing training hub_cards tests benchmarks

.PHONY: help demo test check format bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 10

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# torch first and by its exact version: a looser request would fetch gigabytes of CUDA on a CPU machine.
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found %s" % sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/installed: .venv/torch pyproject.toml
	$(PIP) --constraint constraints.txt --editable '.[serve]'
	touch $@

.venv/developing: .venv/torch pyproject.toml
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch .venv/installed $@

demo: .venv/installed ## run the whole method on the embedded data set; results in demo_output/
	$(BIN)/mllm-msr demo --output demo_output

test: .venv/developing ## run the whole test suite; DEVICE=cuda: on a GPU; DEVICE=other: on none, but as if (CONTRIBUTING.md)
	OMP_NUM_THREADS=1 MLLM_MSR_TEST_DEVICE=$(or $(DEVICE),cpu) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Type checkers do not see the package-dir mapping, so they read a copy that is laid out by it.
check: .venv/developing ## lint, formatting and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	rm -rf build && mkdir -p build/typecheck && cp -r src/mllm_msr build/typecheck
	cp -r hub_cards modeling processing training build/typecheck/mllm_msr
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p mllm_msr

format: .venv/developing ## rewrite the sources in the house format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: .venv/installed ## measure training and ranking against the usual ways; figures in benchmarks/results.json
	$(BIN)/python benchmarks/performance.py --output benchmarks/results.json

clean: ## remove everything that make made
	rm -rf .venv build demo_output
