# make demo | make test | make test-all | make test-slow | make lint | make miniature | make reproduce | make clean
# Each Python has its own folder: make test PYTHON=python3.13 works in .venv-python3.13.
PYTHON ?= python3
VENV ?= .venv$(if $(filter python3,$(PYTHON)),,-$(notdir $(PYTHON)))
RUN = $(VENV)/bin/python
# Without PyTorch the tests that compare with it are skipped. It is left out for a PYTHON of your own
# choice (its build for that one may be gigabytes of CUDA); TORCH=yes installs it.
TORCH ?= $(if $(filter python3,$(PYTHON)),yes,no)
TESTS ?= tests
OUT ?= out/demo
WORKERS ?= 2
export JAX_PLATFORMS ?= cpu
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo miniature reproduce test test-all test-slow lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	[ $(TORCH) = no ] || $(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable \
	  '.[test$(if $(filter no,$(TORCH)),,,parity)]'
	touch $@

# Under five minutes on two CPU cores: edits by the shipped miniature, a new kind of edit that it
# learns from 200 pairs, exports.
demo: setup
	$(RUN) examples/miniature/demo.py $(OUT)

# Everything of the miniature from nothing, as what is shipped in assets/ was made: about five hours.
# Killed, it goes on where it was.
miniature: setup
	$(RUN) examples/miniature/make.py out/miniature

# The data factory from captions to an editor, in the miniature: two to three hours; SMALL=1: six minutes.
reproduce: setup
	$(RUN) examples/miniature/reproduce.py out/reproduce$(if $(SMALL),-small --small)

# Tests mostly wait for one thread of a compiler; a worker takes up to 3 GB.
test: setup lint
	$(RUN) -m pytest -m 'not slow and not long' --numprocesses $(WORKERS) --dist loadfile $(TESTS)

# With the long ones, as a change must pass them.
test-all: setup lint
	$(RUN) -m pytest -m 'not slow' --numprocesses $(WORKERS) --dist loadfile $(TESTS)

# The full-size ones, real compilers, several processes: hours, and up to 16 GB.
test-slow: setup
	$(RUN) -m pytest -m slow

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf .venv .venv-* out build *.egg-info
