# The same commands for people and CI. Everything lives in .venv; only Python ≥ 3.11 is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve test check bench clean
.DEFAULT_GOAL := demo

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[engine,modal,dev]'
	@touch $@

demo: .venv/installed  ## a picture and a prompt in, a picture out; then a page of them
	$(BIN)/zimage run examples/apple.png "a pear on a white background" --out out/pear.png --seed 7 --json
	$(BIN)/python scripts/contact_sheet.py

serve: .venv/installed  ## the API on http://127.0.0.1:8000
	$(BIN)/zimage serve

test: .venv/installed check  ## everything CI runs
	$(BIN)/pytest

check: .venv/installed  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed  ## ratios against bare diffusers; overhead of the gateway
	$(BIN)/python scripts/bench.py engine gateway encode

clean:
	rm -rf .venv out build *.egg-info
