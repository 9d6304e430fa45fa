# Every target sets itself up: `make demo` on a fresh checkout is enough.

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON_IN_VENV := .venv/bin/python

# PYTHON  interpreter for .venv (3.10 to 3.13; default: python3, or the one .venv already has)
# DEVICE  auto (the GPU where one is usable, else the CPU, saying so), cpu or gpu
# MODEL   which model `make perf` measures
PYTHON ?=
DEVICE ?= auto
MODEL ?= transformer
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
export PYTHON DEVICE MODEL HTTP_PORT GRPC_PORT METRICS_PORT

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  \1\t\2/' | expand -t 12

.PHONY: setup
setup: ## Make .venv with everything that serving, testing and developing need
	@./setup.sh
