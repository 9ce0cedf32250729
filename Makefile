PYTHON ?= python3
BIN := .venv/bin
export RAY_AUTH_MODE := token

.PHONY: install oracles demo test check unit

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("raymerge needs Python 3.11 or newer; try make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

oracles: install  ## mergekit, MLX and bitsandbytes, which some tests need; without them those are skipped
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,mergekit,mlx,quantised]'

demo: install  ## the whole path on a world it makes itself: demo/runs/report.html
	$(BIN)/raymerge demo --out demo $(ARGS)

test: install  ## all tests; `make unit` leaves out those that start Ray or processes
	$(BIN)/pytest $(ARGS)

unit: install
	$(BIN)/pytest -m 'not ray and not e2e' $(ARGS)

check: install  ## lint, types, and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
