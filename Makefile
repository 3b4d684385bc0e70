# make help lists what there is. PYTHON=python3.12 make test uses another Python.
PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help run demo test bench clean

help:   ## what there is to make
	@sed -n 's/^\([a-z]*\): *[^#]*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 8

run:    ## the server, as sis_sync.ini says
	$(PYTHON) sis_sync.py

demo:   ## the whole of it on made-up data, in a throw-away database
	$(PYTHON) sis_sync.py demo

# An installed pytest if there is one; else one in .venv, fetched once.
RUNNER = if $(PYTHON) -c 'import pytest' 2>/dev/null; then runner="$(PYTHON)"; else \
	  test -x .venv/bin/pytest || { $(PYTHON) -m venv .venv && .venv/bin/pip install --quiet pytest; } || exit 1; \
	  runner=.venv/bin/python; fi; exec $$runner

test:   ## the tests
	@$(RUNNER) -m pytest -q test_sis_sync.py

bench:  ## the speed of this machine, as ratios to the floor
	@$(RUNNER) test_sis_sync.py bench

clean:  ## remove what the others made, but no database
	rm -rf .venv __pycache__ .pytest_cache .mypy_cache .ruff_cache
