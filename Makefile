# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-long lint sanitize dist clean

# Reinstalled when the pins or the sources of the extension change.
install: $(VENV)/.installed

$(VENV)/.installed: requirements-torch.txt requirements.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-torch.txt
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --editable .
	$(BIN)/python -c "import nca_kernels; print(nca_kernels.explain('cpu', 'token_logps'))"
	touch $@

demo: install
	$(BIN)/python -m nca_kernels demo

# A process for each core, at most eight; a file's tests stay together, since they share what is slow to make.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --require-backend=cpu,triton,torch

test: install
	$(PYTEST)

# Tests of minutes: killed runs, modes of distributed training, statistical power.
test-long: install
	$(PYTEST) -m long

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

sanitize: install
	$(BIN)/python tests/sanitize.py

# The source distribution and a manylinux wheel: built, checked, and a call from each in a fresh environment.
dist: install
	$(BIN)/pip install --quiet -r requirements-dist.txt
	$(BIN)/python tests/dist.py

clean:
	rm -rf build dist out *.egg-info nca_kernels/*.so $(VENV)/.installed
