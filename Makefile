# Every target is one command on a fresh machine with Python 3.11 or newer, pip and make.

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format clean

VENV := .venv
# The interpreter that makes .venv; by default the first of these that is new enough. PYTHON=... overrides.
PYTHON ?=
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python
# Test processes; each one loads torch (about 1 GB with what it compiles).
WORKERS ?= 2

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## /make \1#/p' Makefile | awk -F'#' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(VENV)/installed-compile ## Compile the small demo model to fp32, int8 and int4, complete code with it, print the table
	@$(VENV)/bin/corral demo

test: lint ## Lint, then all tests
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

# Where the peer is built and the models are written: about 50 GB, used again.
BENCH ?= /var/tmp/corral-bench
bench: $(VENV)/installed-dev ## Beside llama.cpp on this CPU, three shapes: hours on a quiet machine; BENCH=directory
	@for shape in demo half wide; do \
		$(VENV)/bin/python benchmarks/cpu.py --shape $$shape --work $(BENCH) --kl --json >$(VENV)/bench.json || exit 1; \
		cp $(VENV)/bench.json benchmarks/results/cpu-$$shape.json; \
	done
	$(VENV)/bin/python benchmarks/cpu_summary.py

lint: $(VENV)/installed-dev ## Style, types, import layers
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/installed-dev ## Rewrite the code in the house format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## Remove .venv and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis corral.egg-info kernels/*corral_cpu_ops.*

# A stamp is younger than the files that say what to install; a failed or interrupted installation leaves none. The CPU
# kernels are built at installation.
INSTALLED_FROM := pyproject.toml setup.py constraints.txt $(wildcard kernels/src/*)
$(VENV)/installed-compile: $(INSTALLED_FROM)
	$(call install,[compile],torch$(comma) onnx$(comma) onnxruntime)
	@touch $@

$(VENV)/installed-dev: $(INSTALLED_FROM)
	$(call install,[compile$(comma)dev],torch$(comma) onnx$(comma) onnxruntime$(comma) test tools)
	@touch $@ $(VENV)/installed-compile

comma := ,

# Make .venv where there is no working one, install the project with extras $(1) into it ($(2) in words), and count the seconds.
define install
	@set -e; log=$(VENV)/pip.log; started=$$(date +%s); \
	new_enough='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(VENV)/bin/python -c "$$new_enough" 2>/dev/null || ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		python=; \
		for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
			if "$$candidate" -c "$$new_enough" 2>/dev/null; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "corral: no Python 3.11 or newer with venv and pip among: $(or $(PYTHON),$(CANDIDATES))." >&2; \
			for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
				found=$$("$$candidate" --version 2>&1) && echo "        $$candidate is $$found" >&2; \
			done; \
			echo "        Install one (and its venv module), or name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
			exit 3; \
		fi; \
		"$$python" -m venv --clear $(VENV) || { echo "corral: $$python could not make $(VENV)." >&2; exit 3; }; \
	fi; \
	printf 'corral: setting up $(VENV) (%s) ' '$(2)'; \
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt -e '.$(1)' >"$$log" 2>&1 & pip=$$!; \
	trap 'kill $$pip 2>/dev/null; echo " stopped"; exit 130' INT TERM; \
	while kill -0 $$pip 2>/dev/null; do printf .; sleep 2; done; \
	if wait $$pip; then echo " $$(($$(date +%s) - started)) s, once"; \
	else echo " failed:" >&2; tail -n 40 "$$log" >&2; echo "corral: pip's whole log is $$log" >&2; exit 3; fi
endef
