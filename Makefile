# `make` lists the targets. `make run` and `make test` need nothing but Python 3.11, git and a C
# compiler: they create .venv on first use, and again only when pyproject.toml or constraints.txt
# has changed.

PYTHON ?=
PYTEST ?=
WORKERS ?= logical

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input -qq

# One BLAS thread a worker (the workers fill the cores), and no network.
TEST_ENV := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1 \
	NUMBA_NUM_THREADS=1 \
	TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
	HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0 MPLBACKEND=Agg

.PHONY: help run test lint types bench mbr results studies clean distclean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

run: .venv/.core  ## compare the ways of choosing rows of Fashion-MNIST (report in out/)
	@mkdir -p out
	$(BIN)/scoredraw compare rows fashion-mnist --target label --report out/fashion-mnist.html

test: .venv/.dev  ## all tests and docstring examples (PYTEST='-k lewis' for some, WORKERS=4)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(PYTEST)

lint: .venv/.dev  ## ruff
	$(BIN)/ruff check src tests benchmarks

types: .venv/.dev  ## mypy --strict
	$(BIN)/mypy

bench: .venv/.dev  ## speed and quality against the peers, in one process
	$(BIN)/python -m benchmarks --out src/scoredraw/results/benchmarks.json

mbr: .venv-mbrs/.done  ## minimum Bayes risk against mbrs, which has an environment of its own
	PYTHONPATH=src .venv-mbrs/bin/python -m benchmarks mbr --out src/scoredraw/results/benchmarks-mbr.json

results: .venv/.dev  ## rerun the papers' experiments at full scale and keep what they measured
	$(BIN)/scoredraw run 1 2 8 9 10 13 15 16 17 20 21 24 25 26 28 35 36 38 40 43 45 46 50 53 58 --scale full --out src/scoredraw/results

studies: .venv/.dev  ## the same of papers whose longer study is kept (hours; resumes)
	$(BIN)/scoredraw run 7 14 27 29 30 32 33 39 47 48 60 61 --scale study --out src/scoredraw/results

clean:  ## remove caches, builds and reports
	rm -rf out build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environments
	rm -rf .venv .venv-mbrs

# ---- set-up ---------------------------------------------------------------------------------
# A stamp is touched last, so an interrupted set-up leaves none and the next call resumes: a broken
# environment is made anew, and a package whose copying was cut off (no RECORD yet) is forgotten,
# so that pip installs it again.

define environment
@rm -f $@
@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	&& $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { for python in $(PYTHON) python3.11 python3 python3.12 python3.13 python3.14; do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		echo "scoredraw: creating .venv with $$($$python --version)"; \
		exec $$python -m venv --clear .venv; \
	done; \
	echo "scoredraw: needs Python 3.11 or later (make PYTHON=/path/to/python3.11)" >&2; exit 1; }
@find .venv/lib/*/site-packages -maxdepth 1 -name '*.dist-info' \
	! -exec test -e '{}/RECORD' \; -exec rm -rf '{}' +
endef

.venv/.core: pyproject.toml constraints.txt
	$(environment)
	@echo "scoredraw: installing the core packages into .venv (about a minute)"
	@$(PIP) --editable . --constraint constraints.txt
	@touch $@

.venv/.dev: pyproject.toml constraints.txt benchmarks/peers.txt
	$(environment)
	@echo "scoredraw: installing all extras and the test tools into .venv (some minutes, 3 GB)"
	@$(PIP) --editable '.[dev]' --constraint constraints.txt
	@$(PIP) --no-deps --requirement benchmarks/peers.txt
	@touch .venv/.core $@

.venv-mbrs/.done: .venv/.dev benchmarks/mbrs.txt
	@$(BIN)/python -m venv --clear .venv-mbrs
	@cd .venv-mbrs/lib/python3*/site-packages && \
		echo "$(CURDIR)"/.venv/lib/python3*/site-packages > scoredraw.pth
	@.venv-mbrs/bin/python -m pip install --disable-pip-version-check --no-input -qq \
		--no-deps --requirement benchmarks/mbrs.txt
	@touch $@
