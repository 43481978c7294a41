# Both targets do all of their set-up: a virtual environment in .venv, made once.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test

demo: .venv/ready
	$(BIN)/p2p-subject demo --out demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@
