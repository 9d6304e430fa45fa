# Every target sets itself up: `make demo` on a fresh checkout is enough.

.DEFAULT_GOAL := help
SHELL := /bin/bash

# PYTHON   interpreter for .venv (3.10 to 3.13; default: the one .venv has, else python3)
# DEVICE   auto (the GPU where one is usable, else the CPU, saying so), cpu or gpu
# MODEL    the model that `make perf` measures; URL the gRPC address of a running server, else perf starts one
# MINUTES  how long `make test-faults` keeps a server under load and looks at its memory
PYTHON ?=
DEVICE ?= auto
MODEL ?= transformer
URL ?=
MINUTES ?= 30
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
export PYTHON

python := .venv/bin/python
lightseq := $(python) -m lightseq_backend
cores := $(shell nproc)

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 12

.PHONY: setup
setup: ## Make .venv with all that serving, testing and developing need
	@./setup.sh

.PHONY: demo
demo: setup ## Start Triton, translate, generate and score over HTTP and gRPC, stop
	@timeout --signal=INT --kill-after=30 180 $(lightseq) serve --device $(DEVICE) \
	    --http-port 0 --grpc-port 0 --metrics-port 0 \
	    --run $(python) examples/demo.py --http {http} --grpc {grpc}

.PHONY: serve
serve: setup ## Serve model_repository in the foreground until Ctrl-C
	@echo 'when ready, try:  curl http://127.0.0.1:$(HTTP_PORT)/v2/models/transformer'
	@$(lightseq) serve --device $(DEVICE) \
	    --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT)

.PHONY: test
test: setup ## Run all tests that need no GPU
	@./setup.sh kernels
	@./setup.sh ray
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	    $(python) -m pytest --durations=15 -n $(cores) --maxprocesses 4 --dist loadfile $(TESTS)

.PHONY: test-faults
test-faults: setup ## Run the tests of overload and faults at full length, the last for MINUTES
	@LIGHTSEQ_FAULT_REQUESTS=10000 LIGHTSEQ_FAULT_FILES=5000 LIGHTSEQ_FAULT_EXAMPLES=2000 \
	    LIGHTSEQ_SOAK_MINUTES=$(MINUTES) $(python) -m pytest --durations=5 -rP \
	    tests/test_overload.py tests/test_remote.py tests/test_operations.py tests/test_damaged_files.py tests/test_soak.py

.PHONY: test-gpu
test-gpu: setup ## Run the tests that need a GPU (install CuPy first: .venv/bin/pip install -e '.[cuda12]')
	@$(python) -m pytest --durations=15 --capture=no tests/gpu

.PHONY: lint
lint: setup ## Check style (ruff) and types (mypy)
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@set -o pipefail; .venv/bin/mypy | sed 's#^\.venv/first_party/##'

.PHONY: bench
bench: setup ## Measure this engine beside Hugging Face's (installs PyTorch)
	@./setup.sh bench
	@$(python) -m benchmarks

.PHONY: bench-gpu
bench-gpu: setup ## Measure operations, models and loading on a GPU, beside PyTorch where it is installed
	@$(python) -m benchmarks.gpu_all

.PHONY: perf
perf: setup ## Measure MODEL with Triton's perf_analyzer at concurrency 1, 4 and 16
	@$(python) benchmarks/perf.py --model $(MODEL) --device $(DEVICE) $(if $(URL),--url $(URL))

.PHONY: bench-server
bench-server: setup ## Measure what serving adds to the engine, beside static batches and a no-op model
	@$(python) -m benchmarks.server --device $(DEVICE)

.PHONY: train
train: setup ## Train both shipped models anew, in under ten minutes (installs PyTorch)
	@./setup.sh train
	@$(python) -m examples.numbers.train

.PHONY: fr2en
fr2en: setup ## Gather Debian's French catalogues and train model_repository/fr2en on them (wants a GPU; 1.1 GB of packages)
	@./setup.sh fr2en
	@$(python) -m examples.fr2en

.PHONY: gpt
gpt: setup ## Train gpt_en anew on prose of Debian packages (1.5 GB to download; wants a GPU for 8 minutes)
	@./setup.sh gpt
	@$(python) -m examples.gpt.prepare
	@$(python) -m examples.gpt.train
	@cp build/gpt/data/tokenizer*.json build/gpt/model
	@rm -rf build/gpt/gpt_en && $(lightseq) convert build/gpt/model build/gpt/gpt_en
	@cp build/gpt/gpt_en/*.safetensors build/gpt/gpt_en/*.json model_repository/gpt_en
	@$(python) -m examples.gpt.evaluate

.PHONY: clean
clean: ## Remove .venv and everything else that was made
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
