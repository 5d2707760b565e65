# `make demo` and `make test` work on a fresh machine that has Python 3.11 or newer and make.
#
#   PYTHON=python3.12   the Python to make the environment from. Without it: the first of the Pythons below that is
#                       new enough, one that already has a torch that is new enough before the others.
#   VENV=path           the environment to use; it is made if it is not there. A torch >= 2.11 and < 2.14 that is
#                       found in it, or in the Python that it is made from, is used as it is; otherwise the pinned
#                       version is installed.
#   WORKERS=4           how many processes run tests; as many as there are cores without it.
#   ARGS="-k budget"    more arguments for the command that the target runs.

VENV ?= .venv
WORKERS ?= auto
PYTHON ?=
ARGS ?=

override PYTHONS := $(or $(PYTHON),python3.11 python3.13 python3.12 python3.14 python3 python)
override BIN := $(VENV)/bin
override READY := $(VENV)/.vlmrewrite
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
HAS_TORCH := import importlib.metadata as m; v = m.version("torch"); \
	assert (2, 11) <= tuple(map(int, v.split(".")[:2])) < (2, 14); print(v)
override OLDEST := .venv-oldest
override OLDEST_PINS := torch==2.11.0 transformers==5.23.0 triton==3.6.0
override OLDEST_TESTS := $(addprefix tests/,graph/test_compat.py graph/test_compat_dynamo.py unit/test_compat_operators.py \
	graph/test_capture.py graph/test_threads.py models/test_families.py unit/test_ops.py kernels/test_contract.py)
override ECOSYSTEM := .venv-ecosystem
override SERVING := .venv-serving
override RAY_TESTS := tests/unit/test_actors.py tests/cli/test_map.py
override QUICK := tests/unit tests/graph
SITES := import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))

# Whichever checkout an environment was made for, what runs is this one.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.DEFAULT_GOAL := help
.PHONY: help demo test quick aot mutants properties families oldest ecosystem serving lint format typecheck docs wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## ask the bundled model about a scene, with and without a recipe; writes demo.png
	$(BIN)/python examples/demo.py $(ARGS)

test: $(READY) ## all tests, in WORKERS processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests $(ARGS)

quick: $(READY) ## the tests of units and graphs that take no time, in WORKERS processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(QUICK) $(ARGS)

aot: $(READY) ## compile all kernels for GPUs that are not there, in every configuration; keep what comes out (minutes)
	$(BIN)/python -m pytest tests/aot/test_aot.py --every-config $(ARGS)

mutants: $(READY) ## seeded faults, one at a time: which do the tests find? (hours; ARGS="--sample 3 --seed 1")
	$(BIN)/python -m tests.mutants $(ARGS)

properties: $(READY) ## thousands of examples over all families, each judged by the oracle (an hour; ARGS="--examples 5000")
	$(BIN)/python -m tests.property.many $(ARGS)

families: $(READY) ## which technique works with which family of models (ARGS="--run" finds out anew)
	$(BIN)/python -m vlmrewrite families $(ARGS)

oldest: $(OLDEST)/.vlmrewrite ## quick tests with the oldest torch, transformers and Triton (an environment of several GB)
	$(OLDEST)/bin/python -m pytest -m "not slow" $(OLDEST_TESTS) $(ARGS)

ecosystem: $(ECOSYSTEM)/.vlmrewrite ## recipes with PEFT, bitsandbytes, torchao, lmms-eval (an environment of its own)
	$(ECOSYSTEM)/bin/python -m pytest tests/ecosystem $(ARGS)

serving: $(SERVING)/.vlmrewrite ## recipes in vLLM and over Ray, on CPUs (an environment of its own; 20 minutes)
	@PYTHONPATH="$(CURDIR)/tests/serving/site:$(PYTHONPATH)" $(SERVING)/bin/python -c 'import vllm, ray' || \
		{ echo "make: vLLM or Ray cannot be imported in $(SERVING): remove the folder, and make serving again" >&2; exit 1; }
	PYTHONPATH="$(CURDIR)/tests/serving/site:$(PYTHONPATH)" $(SERVING)/bin/python -m pytest tests/serving $(RAY_TESTS) $(ARGS)

lint: $(READY) ## ruff: rules and format; who imports whom; the compiler's lines of code
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/lines.py

format: $(READY) ## ruff: rewrite what `make lint` finds
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

typecheck: $(READY) ## mypy --strict on vlmrewrite, passes, recipes, examples, benchmarks and tools
	$(BIN)/python -m mypy --strict

docs: $(READY) ## the documentation, in strict mode, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

wheel: $(READY) ## build sdist and wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --quiet --no-isolation .

clean: ## remove builds and caches (the environment stays)
	rm -rf build dist site *.egg-info demo.png .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find vlmrewrite passes recipes tests examples benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@set -e; \
	if [ ! -x "$(BIN)/python" ]; then \
		chosen=; \
		for python in $(PYTHONS); do \
			"$$python" -c '$(NEW_ENOUGH)' 2>/dev/null || continue; \
			chosen="$${chosen:-$$python}"; \
			if "$$python" -c '$(HAS_TORCH)' >/dev/null 2>&1; then chosen="$$python"; break; fi; \
		done; \
		if [ -z "$$chosen" ]; then \
			echo "make: expected Python 3.11 or newer, found none among: $(PYTHONS); set PYTHON=path" >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$chosen"; \
		"$$chosen" -m venv "$(VENV)"; \
		if "$$chosen" -c '$(HAS_TORCH)' >/dev/null 2>&1; then \
			site=$$("$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
			"$$chosen" -c '$(SITES)' > "$$site/reused.pth"; \
		fi; \
	fi; \
	pins="$(VENV)/constraints.txt"; \
	if torch=$$("$(BIN)/python" -c '$(HAS_TORCH)' 2>/dev/null); then \
		echo "Using the torch $$torch that is there"; \
		grep -Ev '^(torch|setuptools)==' constraints.txt > "$$pins"; \
	else \
		cp constraints.txt "$$pins"; \
	fi; \
	"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(BIN)/python" -m ensurepip; \
	"$(BIN)/python" -m pip install -c "$$pins" 'setuptools>=77.0.3'; \
	"$(BIN)/python" -m pip install -c "$$pins" --no-build-isolation -e '.[examples,dev,docs]'; \
	touch "$@"

# Of the Python that $(VENV) has, but with packages of its own: run it before a release, and when vlmrewrite/compat changes.
$(OLDEST)/.vlmrewrite: pyproject.toml constraints.txt $(READY)
	$(BIN)/python -m venv "$(OLDEST)"
	grep -Ev '^(torch|transformers|triton|setuptools)==' constraints.txt > "$(OLDEST)/constraints.txt"
	printf '%s\n' $(OLDEST_PINS) >> "$(OLDEST)/constraints.txt"
	$(OLDEST)/bin/python -m pip install -c "$(OLDEST)/constraints.txt" 'setuptools>=77.0.3'
	$(OLDEST)/bin/python -m pip install -c "$(OLDEST)/constraints.txt" --no-build-isolation -e '.[dev]'
	touch "$@"

# Borrows what $(VENV) has, and adds the libraries of tests/ecosystem/requirements.txt. Of the packages of apart.txt what they
# ask for is not installed: dozens of packages that the tests need nothing of.
$(ECOSYSTEM)/.vlmrewrite: tests/ecosystem/requirements.txt tests/ecosystem/apart.txt $(READY)
	$(BIN)/python -m venv "$(ECOSYSTEM)"
	$(BIN)/python -c '$(SITES)' > "$$($(ECOSYSTEM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	cp "$(VENV)/constraints.txt" "$(ECOSYSTEM)/constraints.txt"
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^(torch|transformers|triton|numpy)==' | cut -d+ -f1 >> "$(ECOSYSTEM)/constraints.txt"
	$(ECOSYSTEM)/bin/python -m pip install -c "$(ECOSYSTEM)/constraints.txt" -r tests/ecosystem/requirements.txt
	$(ECOSYSTEM)/bin/python -m pip install --no-deps -r tests/ecosystem/apart.txt
	touch "$@"

# Borrows what $(VENV) has. What vLLM names beside that is in requirements.txt; of the packages of apart.txt what they ask
# for is not installed: it is other builds of torch, and another transformers.
$(SERVING)/.vlmrewrite: tests/serving/requirements.txt tests/serving/apart.txt $(READY)
	$(BIN)/python -c 'import torch; v = torch.__version__; assert v.startswith("2.13."), f"vLLM for CPUs is built for torch 2.13, got {v}"'
	$(BIN)/python -m venv "$(SERVING)"
	$(BIN)/python -c '$(SITES)' > "$$($(SERVING)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^(torch|transformers|triton)==' | cut -d+ -f1 > "$(SERVING)/constraints.txt"
	$(SERVING)/bin/python -m pip install --no-deps -r tests/serving/apart.txt
	$(SERVING)/bin/python -m pip install -c "$(SERVING)/constraints.txt" -r tests/serving/requirements.txt
	$(SERVING)/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch "$@"
