# make demo | make test | make test-slow | make lint | make clean
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
OUT ?= out/demo
export JAX_PLATFORMS ?= cpu
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-slow lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(RUN) examples/random_checkpoint.py $(OUT)/checkpoint
	$(RUN) sample.py --ckpt $(OUT)/checkpoint --input assets/photos/coffee.png \
	  --edit "make the cup blue" --output $(OUT)/edited.png --steps 20 --resolution 256 --seed 1
	$(RUN) sample.py --ckpt $(OUT)/checkpoint --input assets/photos/coffee.png \
	  --edit "make the cup blue" --output $(OUT)/grid.png --steps 10 --resolution 128 --seed 1 --grid
	$(VENV)/bin/ip2p convert $(OUT)/checkpoint $(OUT)/exported --to diffusers --overwrite
	$(VENV)/bin/ip2p convert $(OUT)/checkpoint $(OUT)/exported.safetensors --to ldm --overwrite
	rm -rf $(OUT)/pairs $(OUT)/shards $(OUT)/run
	$(RUN) examples/pairs_from_photos.py assets/photos $(OUT)/pairs
	$(VENV)/bin/ip2p check $(OUT)/pairs
	$(VENV)/bin/ip2p pack $(OUT)/pairs $(OUT)/shards --holdout 0.1
	$(RUN) train.py --config=configs/tiny.py --workdir=$(OUT)/run \
	  --config.checkpoint=$(OUT)/checkpoint --config.data.path=$(OUT)/shards
	$(VENV)/bin/ip2p convert $(OUT)/run $(OUT)/trained --overwrite
	@echo
	@echo "$(OUT)/edited.png and $(OUT)/grid.png are edits of assets/photos/coffee.png. The weights"
	@echo "are random, so they show noise: with a trained checkpoint the same commands edit."
	@echo "$(OUT)/run holds a short training, previews and metrics; $(OUT)/trained its editor."

test: setup lint
	$(RUN) -m pytest -m 'not slow'

test-slow: setup
	$(RUN) -m pytest -m slow

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) out build *.egg-info
