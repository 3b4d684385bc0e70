# make help lists what there is. make test PYTHON=python3.12 uses another Python.
PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help run demo test bench clean

help:   ## what there is to make
	@sed -n 's/^\([a-z]*\): *[^#]*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 8

run:    ## the server, as sis_sync.ini says
	$(PYTHON) sis_sync.py

demo:   ## the whole of it on made-up data, in a throw-away database
	$(PYTHON) sis_sync.py demo

# An installed pytest if there is one; else one in .venv, fetched once for each PYTHON.
RUNNER = $(PYTHON) sis_sync.py --version >/dev/null || exit 1; \
	  if $(PYTHON) -c 'import pytest' 2>/dev/null; then runner="$(PYTHON)"; else \
	  of=$$($(PYTHON) -c 'import sys; print(sys.base_prefix, sys.version.split()[0])'); \
	  test -x .venv/bin/pytest && test "$$of" = "$$(cat .venv/of 2>/dev/null)" || { \
	    rm -rf .venv; $(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet --retries 1 pytest \
	    && echo "$$of" > .venv/of; } || { rm -rf .venv; echo "$$HELP" >&2; exit 1; }; \
	  runner=.venv/bin/python; fi; exec $$runner

define HELP
make: the tests need pytest; $(PYTHON) has none, and it could not be fetched. Without a network, either
  install your system's package of it (Debian, Ubuntu, Fedora: python3-pytest), or fetch it elsewhere:
  where there is a network, with the same version of Python:  python3 -m pip download -d wheels pytest
  here, with that folder:  PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make test
The server itself needs nothing:  $(PYTHON) sis_sync.py demo
endef
export HELP

test:   ## the tests
	@$(RUNNER) -m pytest -q test_sis_sync.py

bench:  ## the speed of this machine, as ratios to the floor
	@$(RUNNER) test_sis_sync.py bench

clean:  ## remove what the others made, but no database
	rm -rf .venv __pycache__ .pytest_cache .mypy_cache .ruff_cache
