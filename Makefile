# Commands for people. Each sets up $(VENV) by itself; `make VENV=path ...` uses another one.
VENV ?= .venv
# The newest supported interpreter that really starts (a version manager may leave dead shims).
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c "" 2>/dev/null && echo $$p && break; done)
STAMP := $(VENV)/.lgm_scale-installed
DEEPSPEED := $(VENV)/.deepspeed-installed
BIN := $(VENV)/bin

# OpenMP threads that spin while they wait bring a shared CPU to a crawl.
export OMP_WAIT_POLICY = passive
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help install quickstart demo test test-system lint clean

help:
	@echo "make quickstart   install, then the whole pipeline on demo photographs (minutes, no GPU)"
	@echo "make demo         the same on Fashion-MNIST (a quarter of an hour); SOURCE=--download gets it"
	@echo "make test         all tests that this machine can run"
	@echo "make test-system  tests against real servers, installed through apt (as root)"
	@echo "make lint         ruff and pyright"
	@echo "make clean        delete runs/quickstart and runs/demo"
	@echo "Add VENV=path to use an environment elsewhere, PYTHON=... to choose the interpreter."

install: $(STAMP) $(DEEPSPEED)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar on -e '.[dev]'
	@touch $@

# DeepSpeed comes as source whose setup imports torch: after torch, and without the isolation that
# would hide it. Its kernels are not compiled; training needs none of them.
$(DEEPSPEED): $(STAMP)
	$(BIN)/python -m pip install --quiet 'setuptools>=68' wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --progress-bar on --no-build-isolation -e '.[deepspeed]'
	@touch $@

quickstart: $(STAMP)
	@sh quickstart.sh

# SOURCE: options of data_tools/fashion_mnist.py, such as --download.
demo: $(STAMP)
	@sh demo.sh $(SOURCE)

# Unit tests in two processes, each file in one; the others start processes of their own.
test: $(STAMP) $(DEEPSPEED)
	pytest -n 2 --dist loadfile tests/unit
	pytest tests/distributed tests/system

test-system: $(STAMP) $(DEEPSPEED)
	pytest -m servers tests/system

lint: $(STAMP) $(DEEPSPEED)
	ruff check .
	ruff format --check .
	pyright

clean:
	rm -rf runs/quickstart runs/demo
