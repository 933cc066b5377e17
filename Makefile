# make demo | make test | make test-slow | make lint | make miniature | make reproduce | make clean
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
OUT ?= out/demo
WORKERS ?= 2
export JAX_PLATFORMS ?= cpu
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo miniature reproduce test test-slow lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Eight minutes on two CPU cores: edits by the shipped miniature, a training of its own, exports.
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
	$(RUN) -m pytest -m 'not slow' --numprocesses $(WORKERS) --dist loadfile

test-slow: setup
	$(RUN) -m pytest -m slow

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) out build *.egg-info
