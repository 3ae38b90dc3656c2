# make demo: a real model, compressed, measured and drawn.    make test: the whole suite on a CPU.
#
#   make demo MODEL=<hub name or directory> DATA=<file, directory or dataset name> ARGS="--minutes 30"
#   make test ARGS="-k sizing"

PYTHON ?= python3
VENV ?= .venv
# Before everything that depends on it, so that nothing else chooses a build of torch.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/with-demo
	$(BIN)/acip demo --output runs/demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(VENV)/with-test
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

lint: $(VENV)/with-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/with-torch:
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed: make PYTHON=...' if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	touch $@

$(VENV)/with-demo: pyproject.toml $(VENV)/with-torch
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[demo,data]"
	touch $@

$(VENV)/with-test: pyproject.toml $(VENV)/with-torch
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
