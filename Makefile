# Every target creates the environment it needs; run `make help` for the list.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
PAPER  ?= attention_rhythm
SCALE  ?= laptop
JOBS   ?= 2

QUICK  := not (notebook or ray or vllm or browser or build or slow)

.PHONY: help env run check test sweep style lab docs readme notebooks export clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

env: ## create or repair the environment
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

run: env ## execute the flagship series and print its claims (PAPER=..., SCALE=...)
	@$(BIN)/llmpapers run $(PAPER) --scale $(SCALE)

check: env ## minutes: ruff, generated files, unit and property tests
	@$(BIN)/ruff format --check nbs tests tools setup.py
	@$(BIN)/ruff check nbs tests tools setup.py
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m "$(QUICK)" tests

test: env ## run everything that is tested
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --durations=30 tests

sweep: env ## every architecture of the installed transformers, in sampling, training and capture
	@LLMPAPERS_SWEEP=all $(BIN)/python -m pytest -n $(JOBS) -rs tests/test_sweep.py tests/test_capture_models.py

style: env ## how the notebooks read, in figures beside good models: a report
	@$(BIN)/python tools/style_report.py

lab: env ## open JupyterLab on the notebooks
	@$(BIN)/llmpapers lab

docs: env ## build the site (Quarto if it is installed, else pandoc)
	@if command -v quarto >/dev/null; then quarto render; else $(BIN)/python tools/render_docs.py; fi

readme: env ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/make_readme.py

notebooks: env ## execute all notebooks at laptop scale and save their outputs
	@$(BIN)/python tools/save_outputs.py --jobs $(JOBS)

export: env ## write the modules from the notebooks
	@$(BIN)/nbdev_export

clean: ## remove what was built, but not the environment
	@rm -rf build dist _docs _proc _executed _runs *.egg-info
