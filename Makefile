# Two commands do everything: `make book` and `make test`. Both may be repeated and take up where they were interrupted.
#   PYTHON=...       the interpreter to build the environment with (default: the first Python 3.10-3.13 found)
#   TORCH_INDEX=...  address of a package index to take torch from, e.g. the CPU builds listed on PyTorch's install page

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help book test plain env models site student generated clean distclean

# The package asks for a lower bound only. The book's own environment names the version that its numbers were made with.
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# A new pyproject.toml means a new stamp, hence a new installation; an old one is left alone.
READY := $(VENV)/.ready-$(shell cat pyproject.toml | cksum | tr -d ' ')
# Hand what `make test` should run to pytest: make test PYTEST="tests/core -x"
PYTEST ?= tests
# How many tests run at a time: one for each core (more than eight wait for the longest file). JOBS=1 shares nothing out and
# lets a test use all cores; a debugger needs that.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
# THREADS: of each of them.
THREADS ?= 1
# A file stays with one process, so that what it builds is built once, and the cells of a notebook run in order. Files start as
# they are listed: the long ones are in tests/core, the short ones and the notebooks at the end.
SPREAD = $(if $(filter-out 0 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder)
# What depends on the dtype that a processor is fast in: whatever loads a language model, counts bytes or autocasts.
MODEL_TESTS := tests/core/test_stored.py tests/core/cache tests/kvcache tests/lab/models tests/lab/study/test_precision.py \
	tests/studies tests/test_cache_speed.py tests/test_cli_models.py tests/test_readme.py \
	tests/test_exercises.py::test_exercises[eora]
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait for each other sleep instead of spinning. On two cores that something else uses as well, an eigendecomposition
# of size 1536 took 32 s with spinning and 0.8 s without; an idle machine loses nothing.
export OMP_WAIT_POLICY ?= PASSIVE

help:  ## say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

env: $(READY)  ## create .venv and install everything the book needs

$(READY): pyproject.toml
	@# pip is what a creation that was cut short lacks
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || bash scripts/new_venv.sh $(VENV)
	@# Without a GPU the CPU build of torch is enough. Which build a plain install brings depends on your index: on Linux
	@# the default one carries the CUDA libraries (several GB). TORCH_INDEX chooses another; a torch already here is kept.
	@if ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
		if [[ -z "$(TORCH_INDEX)" && "$$(uname)" == Linux ]] && ! command -v nvidia-smi >/dev/null; then \
			echo "No GPU found. If the torch that follows brings CUDA libraries you do not want, stop and pass TORCH_INDEX=<address of the CPU builds>."; \
		fi; \
		$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'; \
	fi
	$(BIN)/python -m pip install -e '.[all]'
	@rm -f $(VENV)/.ready-* && touch $@

models: $(READY)  ## fetch the small models and texts (kept in a cache; checked by hash)
	@$(BIN)/python -m refimpl fetch

book: models  ## execute the tour on the real model and render the book
	@$(BIN)/python scripts/execute.py notebooks/tour.ipynb
	@$(MAKE) --no-print-directory site
	@echo "Open _build/html/index.html in a browser: file://$(CURDIR)/_build/html/index.html"

site: $(READY)  ## render the book from the committed outputs, warnings as errors
	@$(BIN)/jupyter-book build -W -n --keep-going --quiet .
	@$(BIN)/python scripts/check_book.py _build/html

test: models  ## run the tests and every notebook at its quick size, JOBS at a time (default: the number of cores)
	REFIMPL_PROFILE=quick $(if $(SPREAD),OMP_NUM_THREADS=$(THREADS)) $(BIN)/python -m pytest $(SPREAD) --nbval-lax --nbval-cell-timeout 300 $(PYTEST) $(if $(filter tests,$(PYTEST)),notebooks) $(PYTEST_ARGS)

plain:  ## run the tests that touch models once more, as on a plain processor (AVX2: no AVX-512, no bf16)
	@ONEDNN_MAX_CPU_ISA=AVX2 $(MAKE) --no-print-directory test PYTEST="$(MODEL_TESTS)"

student: $(READY)  ## the notebooks without their solutions, in _build/student/
	@$(BIN)/python scripts/student.py _build/student

generated: $(READY)  ## write the files that follow from papers.toml, _config.yml and the cards of models
	@$(BIN)/python -m refimpl_book.generate --write

clean:  ## remove what was built; the environment and the model cache stay
	rm -rf _build dist .pytest_cache .mypy_cache .ruff_cache

distclean: clean  ## remove the environment as well
	rm -rf $(VENV)
