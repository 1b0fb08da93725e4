PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo test gpu-check lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The evaluation uses one module of torch-fidelity; its torchvision would not be imported.
	$(RUN) -m pip install --quiet --no-deps torch-fidelity==0.4.0
	touch $@

# 1,000 digits with DepthVAR at half of the full token-layers, into 4 shards, and a page on them.
demo: setup
	$(VENV)/bin/depthvar generate --model digits --classes 0-9 --per-class 100 \
	    --policy depthvar --reference-scale 3 --samples-per-shard 250 --save-depth-maps \
	    --out out/digits
	$(VENV)/bin/depthvar report out/digits

# Hundreds of processes import the code: it is compiled once, also where bytecode is not kept.
test: export PYTHONDONTWRITEBYTECODE =
test: setup lint
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Needs no more than a Python with torch, numpy and safetensors: make gpu-check PYTHON=python3
gpu-check:
	$(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(RUN)) $(PYTHON)),$(PYTHON)) -m tests.gpu_check

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
