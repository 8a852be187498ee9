# People and CI run the same commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
IMAGES ?= layerstack
TAG ?= latest
BUILD_OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo up test faults lint format docs bench images lock clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

install: $(INSTALLED) ## Create .venv with everything in it, at the versions of requirements.lock

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "layerstack needs Python 3.11 or later, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## From nothing to a finished job: start the stack, encode prompts, check them, stop
	$(BIN)/python examples/demo.py

up: $(INSTALLED) ## Start the local stack on the demo encoder; Ctrl-C stops it
	$(BIN)/layerstack up

# Threads of torch that wait for each other's core take more time than they save.
test: $(INSTALLED) ## Run the whole suite, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: $(INSTALLED) ## Inject 200 faults into a running stack, and print the table of docs/reliability.md
	$(BIN)/python -m tests.faults.long --faults 200

lint: $(INSTALLED) ## Style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## Put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## The documentation as a site, in site/; every link is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(INSTALLED) ## Reference against ours on the prompts of examples/
	$(BIN)/python -m benchmarks.encoder --prompts examples/prompts.txt --hidden 256

images: ## Build the images of API and worker: $(IMAGES)-api:$(TAG), $(IMAGES)-worker:$(TAG)
	for image in api worker; do \
		docker build --file Dockerfile.$$image --tag $(IMAGES)-$$image:$(TAG) $(BUILD_OPTIONS) \
			--build-arg REVISION=$$(git describe --always --dirty --abbrev=40) \
			--build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) . || exit 1; \
	done

lock: $(INSTALLED) ## Resolve requirements.lock anew
	$(BIN)/pip-compile --quiet --extra dev --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--no-annotate --no-header --allow-unsafe --output-file requirements.lock pyproject.toml
	sed -i.bak -e '/^layerstack @/d' -e 's/+cpu$$//' requirements.lock && rm requirements.lock.bak

clean: ## Remove .venv, site/ and what the demo wrote
	rm -rf $(VENV) demo-results site
