# Two environments, one for each transformers major; everything else runs inside them.
PYTHON ?= python3.11
ENV4 := .venv/transformers-4
ENV5 := .venv/transformers-5
PYTEST := -m pytest -n 2
export HF_HUB_OFFLINE := 1

.PHONY: help demo demo-train test test-4 test-5 test-slow test-newest compat lint format clean

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(ENV5)/.ready            ## load the shipped checkpoint and answer questions about unseen pictures
	$(ENV5)/bin/saisa demo

demo-train: $(ENV5)/.ready      ## train that checkpoint again from nothing (two cores: a quarter of an hour)
	$(ENV5)/bin/saisa demo --train demo-checkpoint

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

compat: $(ENV5)/.ready          ## the remote-code round trip on every transformers release from 4.57 on
	HF_HUB_OFFLINE=0 $(ENV5)/bin/python scripts/compat.py

lint: $(ENV5)/.ready            ## ruff: rules and format
	$(ENV5)/bin/ruff check .
	$(ENV5)/bin/ruff format --check .

format: $(ENV5)/.ready
	$(ENV5)/bin/ruff check --fix .
	$(ENV5)/bin/ruff format .

clean:                          ## remove the environments and what the commands above wrote
	rm -rf .venv .compat .pytest_cache .ruff_cache demo-checkpoint saisa-demo.png

.venv/transformers-%/.ready: pyproject.toml constraints/base.txt constraints/transformers-%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check \
		-c constraints/base.txt -c constraints/transformers-$*.txt -e '.[dev]'
	touch $@
