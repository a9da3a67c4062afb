PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed

demo: $(SETUP)
	rm -rf runs/demo
	$(BIN)/minibert demo --out runs/demo

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# all that needs no GPU: the full products of options, sweeps and repetitions too
test-all: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" --fuzz 100

fuzz: $(SETUP)
	$(BIN)/python -m pytest -n 2 -m "not gpu" -k any_call --fuzz 2000 tests/kernels

# minutes: every fault of docs/trust.md as often as the page says
faults: $(SETUP)
	$(BIN)/python -m tests.faults

# minutes, and gigabytes the first time: the newest release of every dependency that setup.py allows, without constraints
LATEST ?= .venv-latest
test-latest: $(LATEST)/.installed
	$(LATEST)/bin/python -m pytest -n 2 -m "not slow and not gpu" tests/kernels tests/model tests/parity tests/test_hub.py tests/test_install.py

$(LATEST)/.installed: setup.py
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --upgrade --editable ".[dev]"
	touch $@

lint: $(SETUP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# the marker is newer than what it was installed from, so a second call installs nothing
$(SETUP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("minibert needs Python 3.11 or newer, got " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# every kernel, and what steps of BERT-base launch, compiled for four architectures, against xray_limits.json
xray: $(SETUP)
	$(BIN)/minibert xray --launches

# an hour and gigabytes the first time: the same for every Triton that is supported
TRITONS ?= .tritons
triton-matrix: $(SETUP)
	$(BIN)/python -m minibert_kernels.matrix --tritons $(TRITONS)

bench: $(SETUP)
	$(BIN)/python -m benchmarks infer --quick

# for a machine with a GPU and no network: nothing is installed
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu --minutes $(or $(MINUTES),9)

.PHONY: demo test test-all test-latest fuzz faults lint xray triton-matrix bench gpu
