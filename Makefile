# All targets do all of their set-up: a virtual environment, made once; .venv-oldest for test-oldest, .venv for the others.
PYTHON ?= python3.11
BIN := .venv/bin
OLDEST := .venv-oldest/bin

.PHONY: demo test test-oldest

demo: .venv/ready
	$(BIN)/p2p-subject demo --out demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-oldest: .venv-oldest/ready
	$(OLDEST)/python -m pytest --numprocesses auto --dist worksteal -m 'not once'

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# torch itself stays: its older CPU builds are not on PyPI, and the others bring gigabytes of CUDA.
.venv-oldest/ready: setup.cfg pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/pip install --quiet torch==2.13.0 --constraint tests/oldest.txt
	$(OLDEST)/pip install --quiet --editable '.[test]' --constraint tests/oldest.txt
	touch $@
