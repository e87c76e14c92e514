# Every target sets up what it needs; repeating one is safe and quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Servers, engines and the judge of their answers share few cores: threads that spin while they wait would starve them.
# Each of many processes would compile the sources again where Python is told to keep nothing of it.
TEST_ENV := OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE=
# What is compared with numbers of a CPU leaves a GPU alone that happens to be there.
ON_CPU := $(TEST_ENV) CUDA_VISIBLE_DEVICES= VICO_TEST_DEVICE=cpu
ON_GPU := $(TEST_ENV) VICO_TEST_DEVICE=cuda
# The Triton kernels run on the CPU in Triton's interpreter, which has to be chosen for a whole process.
INTERPRETED := tests/kernels tests/vision/test_kernels.py tests/adapter/engine/test_chat_model.py
# The rooms whose tests are parts of their own, so that parts take about the same time.
ADAPTER := tests/adapter tests/autoload tests/cpu
REST := tests/bench tests/benchmarks tests/checkpoints tests/docs tests/house
# Without the tests that other targets run, and those that need what a fresh machine does not have.
WANTED := not gpu and not faults and not quality and not ray and not system and not tp
PYTEST := $(BIN)/python -m pytest --durations=10
# Parts side by side, the longest first. Each prints what it has to say when it is done; if it fails, the others go on.
PARTS := $(MAKE) --no-print-directory --output-sync=target --keep-going
SOURCES := lmdeploy_vico kernels benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help setup demo reader check test test-busy test-gpu test-long lint format bench bench-check bench-first-token bench-handover bench-kernels counters soak test-faults test-ray test-reader test-system test-tp kernel-resources clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install the plugin with everything for development (8 GB, a few minutes)

$(STAMP): pyproject.toml
	@echo '==> Checking $(PYTHON)'
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is %d.%d: set PYTHON=..." % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'The venv module is missing: apt-get install python3-venv'; exit 1; }
	@test -x $(BIN)/python || { echo '==> Creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo '==> Installing lmdeploy-vico, LMDeploy and the development tools into $(VENV) (about 8 GB, a few minutes)'
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]' 2>&1 \
		| grep --line-buffered -E '^ *(Downloading .*[0-9]{2} MB|Installing|Building|Successfully|ERROR|error)' | sed -u 's/^\(.\{110\}\).*/\1/'; exit $${PIPESTATUS[0]}
	@touch $@

demo: $(STAMP) ## Serve the reader, a small model that reads, and ask it about documents, as a user would
	@$(BIN)/lmdeploy-vico demo

reader: $(STAMP) ## Train the reader again from nothing, in build/reader (about an hour and a half on 2 quiet cores)
	@$(BIN)/lmdeploy-vico reader --train build/reader

check: $(STAMP) ## Lint, and run every quick test that starts no LMDeploy process (10 minutes on 2 quiet cores)
	@echo '==> Two parts at a time; each prints when it is done'
	@$(PARTS) --jobs=2 check-adapter check-plain check-interpreted check-rest lint

test: $(STAMP) ## Run the tests that need no GPU, those that start servers too (about 20 minutes on 2 quiet cores)
	@echo '==> Four parts at a time, as servers wait a lot; each prints when it is done'
	@$(PARTS) --jobs=4 test-servers test-adapter test-plain test-engines test-rest test-interpreted

# The parts of check and test. Both run the same tests, check without the slow ones.
.PHONY: check-adapter check-interpreted check-plain check-rest
.PHONY: test-adapter test-engines test-interpreted test-plain test-rest test-servers
test-adapter test-interpreted test-plain test-rest: MARKED := not server and not long and $(WANTED)
check-adapter check-interpreted check-plain check-rest: MARKED := not server and not long and not slow and $(WANTED)

check-interpreted long-interpreted test-interpreted: $(STAMP)
	@echo "==> $@: tests in Triton's interpreter"
	@$(ON_CPU) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTEST) -m '$(MARKED)' $(INTERPRETED)

check-adapter test-adapter: $(STAMP)
	@echo '==> $@: tests of what touches LMDeploy, without its processes'
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m '$(MARKED)' $(ADAPTER) $(addprefix --ignore=,$(INTERPRETED))

check-plain test-plain: $(STAMP)
	@echo '==> $@: tests of the other rooms'
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m '$(MARKED)' $(addprefix --ignore=,$(ADAPTER) $(INTERPRETED) $(REST))

check-rest test-rest: $(STAMP)
	@echo '==> $@: tests of checkpoints, benchmarks, documents and layout'
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m '$(MARKED)' $(REST)

test-servers: $(STAMP)
	@echo '==> $@: tests of servers and pipelines'
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m 'server and not long and $(WANTED)' tests/serving

test-engines: $(STAMP)
	@echo '==> $@: other tests that start LMDeploy'
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m 'server and not long and $(WANTED)' --ignore=tests/serving

test-long: $(STAMP) ## Run the rest of them: what takes long, and variants of what make test runs (15 minutes on 2 quiet cores)
	@echo '==> Two parts at a time; each prints when it is done'
	@$(PARTS) --jobs=2 long-servers long-plain long-interpreted

.PHONY: long-interpreted long-plain long-servers
long-interpreted: MARKED := long and $(WANTED)

long-servers: $(STAMP)
	@echo '==> $@: servers and pipelines'
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m 'server and long and $(WANTED)'

long-plain: $(STAMP)
	@echo '==> $@: what starts no LMDeploy process'
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m 'not server and long and $(WANTED)' $(addprefix --ignore=,$(INTERPRETED))

test-busy: $(STAMP) ## Run what waits or counts 50 times beside processes that spin (ARGS='--times 5' for fewer)
	@$(ON_CPU) $(BIN)/python -m pytest -p busy -m 'busy and not gpu' $(ARGS)

test-faults: $(STAMP) ## Attack a server beside good clients, stop and kill its engine (15 minutes; VICO_FAULTS=100 for fewer attacks)
	@VICO_FAULTS=$${VICO_FAULTS:-1000} $(ON_CPU) OMP_NUM_THREADS=1 timeout 900 $(BIN)/python -m pytest -s -m faults tests/faults

test-tp: $(STAMP) ## Serve with 2 and 4 ranks, both executors, two nodes, killed ranks (10 servers; 11 minutes on 2 quiet cores)
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m tp tests/tp

test-reader: $(STAMP) ## Hold the shipped reader to its committed answers, and calibrate to eval (7 minutes)
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m quality tests/serving/reader

test-system: $(STAMP) ## Look at servers with a real Prometheus, Chromium and HAProxy (8 minutes; needs all three)
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m system tests/system

test-ray: $(STAMP) ## Encoders in a Ray cluster: servers, 200 batches, three minutes of encoders that come and go (8 minutes)
	@$(ON_CPU) OMP_NUM_THREADS=1 $(PYTEST) -m ray

test-gpu: $(STAMP) ## Run the tests that need a CUDA device
	@$(ON_GPU) $(BIN)/python -m pytest tests/kernels
	@$(ON_GPU) $(BIN)/python -m pytest -m gpu tests/gpu

lint: $(STAMP) ## Check style, types and the arrows between the rooms
	@echo '==> ruff'; $(BIN)/ruff check $(SOURCES) && $(BIN)/ruff format --check $(SOURCES)
	@echo '==> mypy'; $(BIN)/mypy
	@echo '==> import-linter'; $(BIN)/lint-imports

format: $(STAMP) ## Format the code
	@$(BIN)/ruff check --fix $(SOURCES); $(BIN)/ruff format $(SOURCES)

bench: $(STAMP) ## Time image preparation and the vision stage against LMDeploy's (ARGS=--help lists the options)
	@$(BIN)/python -m benchmarks vision $(ARGS)

bench-check: $(STAMP) ## Fail if anything got slower than the stored baseline (ARGS=--update stores it)
	@$(TEST_ENV) $(BIN)/python -m benchmarks check $(ARGS)

bench-handover: $(STAMP) ## Time the ways to hand visual tokens to the engine's process
	@$(BIN)/python -m benchmarks handover $(ARGS)

bench-first-token: $(STAMP) ## Measure first-token throughput: ARGS='--model DIR' or '--base-url URL'
	@$(BIN)/python -m benchmarks first-token $(ARGS)

bench-kernels: $(STAMP) ## Time the Triton kernels against torch, LMDeploy and the hardware's limits
	@$(BIN)/python -m benchmarks kernels $(ARGS)

counters: $(STAMP) ## Compare what requests make the engine do with the committed counts (ARGS=--update writes them)
	@$(ON_CPU) $(BIN)/python -m benchmarks counters $(ARGS)

soak: $(STAMP) ## Send 2000 requests, a tenth of them cancelled: every answer right, no memory lost
	@$(TEST_ENV) $(BIN)/python -m benchmarks soak $(ARGS)

kernel-resources: $(STAMP) ## Compile the Triton kernels for sm_80, sm_89 and sm_90 and write what they take to the table
	@$(BIN)/python -m benchmarks kernel-resources --update

clean: ## Remove the virtual environment and everything generated
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

SHELL := /bin/bash
