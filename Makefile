# make help lists what there is to make. make test PYTHON=python3.12 uses another Python.
PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help run demo test bench clean

# The tests need pytest. If PYTHON has none, it is fetched into .venv, once for each Python.
VENV = .venv/$(shell $(PYTHON) -c 'import sys; print(sys.implementation.name, *sys.version_info[:3], sep="-")')
FOUND = $(shell $(PYTHON) -c 'import pytest' 2>/dev/null && echo pytest)
TESTER = $(if $(FOUND),$(PYTHON),$(VENV)/bin/python)

help:   ## what there is to make
	@sed -n 's/^\([a-z]*\): *[^#]*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 8

run:    ## the server, as sis_sync.ini says
	$(PYTHON) sis_sync.py

demo:   ## everything, on made-up data
	$(PYTHON) sis_sync.py demo

test: $(if $(FOUND),,$(VENV))   ## the tests
	@$(TESTER) -m pytest -q test_sis_sync.py

bench: $(if $(FOUND),,$(VENV))  ## the speed of this machine, as ratios
	@$(TESTER) test_sis_sync.py bench

# Debian has ensurepip, without which venv makes no pip, in a package of its own.
$(VENV):
	@$(PYTHON) sis_sync.py --version >/dev/null
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$$HELP" >&2; exit 1; }
	@$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet --retries 1 pytest \
	  || { rm -rf $@; echo "$$HELP" >&2; exit 1; }

define HELP
The tests need pytest. $(PYTHON) has none, and it could not be fetched.
On Debian and Ubuntu:  apt install python3-pytest
On Fedora:             dnf install python3-pytest
Without a network, where there is one, with the same version of Python:
                       python3 -m pip download -d wheels pytest
and here, with that folder:
                       PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make test
The server itself needs nothing:  $(PYTHON) sis_sync.py demo
endef
export HELP

clean:  ## remove what the others made, but no database
	rm -rf .venv __pycache__ .pytest_cache .mypy_cache .ruff_cache
