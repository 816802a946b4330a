# Commands for people. Each sets up $(VENV) by itself; `make VENV=path ...` uses another one.
# TORCH=2.11 installs and tests what GPU machines have, instead of the pin.
TORCH ?= 2.7
VENV ?= $(if $(filter 2.7,$(TORCH)),.venv,.venv-torch$(TORCH))
# The newest supported interpreter that really starts (a version manager may leave dead shims).
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c "" 2>/dev/null && echo $$p && break; done)
STAMP := $(VENV)/.lgm_scale-installed
DEEPSPEED := $(VENV)/.deepspeed-installed
BIN := $(VENV)/bin

# By uv, whose downloads and unpacking run side by side. Composer's metadata caps torch below what GPU
# machines have, and uv can be told to pass over that.
INSTALL := $(BIN)/uv pip install --quiet --native-tls --python $(BIN)/python
ifneq ($(TORCH),2.7)
INSTALL += --override constraints/torch-$(TORCH).txt
endif

# Processes share what Python compiles, whatever the shell says: compiling anew costs each 15 seconds.
export UV_COMPILE_BYTECODE ?= 1
export PYTHONDONTWRITEBYTECODE =
# OpenMP threads that spin while they wait bring a shared CPU to a crawl.
export OMP_WAIT_POLICY = passive
export PATH := $(abspath $(BIN)):$(PATH)

# Python processes at once. A rank waits for others more than it computes.
JOBS ?= 3
PYTEST = pytest --jobs $(JOBS)

.PHONY: help install quickstart demo check check-tests test test-all test-torch test-fidelity wheels-gpu test-gpu \
	coverage mutants lint docs clean

help:
	@echo "make quickstart   install, then the whole pipeline on demo photographs (minutes, no GPU)"
	@echo "make demo         the same on Fashion-MNIST, judged by a classifier (a quarter of an hour, no GPU)"
	@echo "make check        lint, and the tests that fail most: before a commit"
	@echo "make test         all tests but those of the next line: before a merge"
	@echo "make test-all     everything: real servers, installed through apt (as root), and random kills"
	@echo "make test-torch TORCH=2.11   a selection on another torch, in an environment of its own"
	@echo "make wheels-gpu   wheels for Python 3.12 that a GPU machine without network may lack (docs/gpu.md)"
	@echo "make test-gpu     tests/gpu on such a machine, with the wheels that lie in build/wheels-gpu"
	@echo "make coverage     lines and branches that 'make test' reaches"
	@echo "make mutants MODULES=... TESTS=...   mistakes in these modules that these tests do not see"
	@echo "make test-fidelity  imports at full size against the releases' code: LGM_RELEASE=path ELIT_RELEASE=path"
	@echo "make lint         ruff and pyright"
	@echo "make docs         the documentation site, into build/site (seconds, no network)"
	@echo "make clean        delete runs/quickstart and runs/demo"
	@echo "Add VENV=path to use an environment elsewhere, PYTHON=... to choose the interpreter."

install: $(STAMP) $(DEEPSPEED)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(INSTALL) -e '.[dev]'
	@touch $@

# DeepSpeed comes as source whose setup imports torch: after torch, and without the isolation that
# would hide it. Its kernels are not compiled; training needs none of them.
$(DEEPSPEED): export DS_BUILD_OPS = 0
$(DEEPSPEED): $(STAMP)
	$(INSTALL) 'setuptools>=77' wheel
	$(INSTALL) --no-build-isolation -e '.[deepspeed]'
	@touch $@

quickstart: $(STAMP)
	@sh quickstart.sh

# DATA=folder: the four files, where Debian's package does not have them.
demo: $(STAMP)
	@DATA="$(DATA)" sh quickstart.sh demo

# Lint beside the tests: two cores have something to do to the end.
check:
	@$(MAKE) --no-print-directory -j2 lint check-tests

check-tests: $(STAMP) $(DEEPSPEED)
	$(PYTEST) -m 'not slow and not servers' tests/unit

test: $(STAMP) $(DEEPSPEED)
	$(PYTEST) -m 'not thorough and not servers'

# Servers' tests wait.
test-all: JOBS = 4
test-all: $(STAMP) $(DEEPSPEED)
	$(PYTEST) -m '' --second-try

# What another torch may change: numbers of the strategies and their exact resume, compilation,
# DeepSpeed, private names, merging, sampling, files of states. Moves between strategies are ours.
test-torch: $(STAMP) $(DEEPSPEED)
	$(PYTEST) -m 'not servers and not thorough' -k 'not test_a_run_moves' \
		$(addprefix tests/distributed/test_,strategies.py compiled.py deepspeed.py) \
		$(addprefix tests/unit/test_,private_names*.py merging*.py sampling.py checkpoint.py)

# No $(VENV): a GPU machine brings its own torch, and what it lacks lies beside it.
WHEELS := build/wheels-gpu
CARRIED := build/gpu-packages

wheels-gpu: $(STAMP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12) and "a GPU machine has Python 3.12, $(PYTHON) is another; set PYTHON=...")'
	rm -rf $(WHEELS)
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) -r constraints/gpu-machine.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps \
		--wheel-dir $(WHEELS) 'deepspeed==0.19.8'
	du -sh $(WHEELS)

test-gpu:
	test -d $(CARRIED) || ! test -d $(WHEELS) || $(PYTHON) -m pip install --quiet --no-index --no-deps \
		--target $(CARRIED) $(WHEELS)/*.whl
	PYTHONPATH=$(CARRIED):. timeout 480 $(PYTHON) -m pytest -m '' tests/gpu

coverage: $(STAMP) $(DEEPSPEED)
	coverage erase
	coverage run -m $(PYTEST) -m 'not thorough and not servers'
	coverage combine --quiet
	coverage report

mutants: $(STAMP)
	PYTHONPATH=tests pytest -p mutants $(addprefix --mutate ,$(MODULES)) -m 'not slow and not servers' $(TESTS)

# Random weights; a release whose folder is not given is skipped.
test-fidelity: $(STAMP)
	LGM_RELEASE="$(LGM_RELEASE)" ELIT_RELEASE="$(ELIT_RELEASE)" pytest -rs tests/fidelity

lint: $(STAMP) $(DEEPSPEED)
	ruff check .
	ruff format --check .
	pyright

# Silent about what the theme's authors plan for other versions.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "Open build/site/index.html; to search it, serve it: python -m http.server --directory build/site"

clean:
	rm -rf runs/quickstart runs/demo
