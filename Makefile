# make quickstart   installs, then fine-tunes SmolLM2-135M on two CPU ranks or the GPUs present (MODEL=tiny: no download)
# make study-small  which rule trains best on rows with an advertisement, in the small, on two cores
# make test-fast    what a change needs while it is written, in two minutes: no processes, three architectures
# make test         every test but the longest (make test-long)
# make gpu          what has to hold on a GPU, and what it takes there; without one as far as a CPU goes
# make lint types   ruff; mypy
#
# An installed torch is never replaced: where $(PYTHON) has one, the virtual environment uses it. Otherwise the pinned
# version is installed, from TORCH_INDEX_URL if set (for example a CPU index).

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
TORCH_VERSION ?= 2.13.0
TORCH_INDEX_URL ?=

BIN := $(VENV)/bin
PIP_INSTALL := DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install quickstart study-small test-fast test test-long gpu lint types golden metrics exports

install: $(VENV)/installed

$(VENV)/torch:
	test -d $(VENV) || $(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(BIN)/pip install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==$(TORCH_VERSION)
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[gguf]'
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[gguf,dev]'
	touch $@

# One pass per rank and optimizer step: the 8 rows of a step are cut into as many micro-batches as there are ranks.
quickstart: $(VENV)/installed
	python -m recipes.quickstart.make_data runs/quickstart-data
	DS_ACCELERATOR=cpu TQDM_DISABLE=1 python -m recipes.quickstart.get_model $(MODEL) models/$(MODEL)
	rm -rf runs/quickstart
	ranks=$$(python -c 'import torch; n = torch.cuda.device_count(); print(max(r for r in (1, 2, 4, 8) if r <= n) if n else 2)'); \
		RANKS=$$ranks launch/local.sh recipes/sft.py --config configs/sft/quickstart.yaml \
			model.name_or_path=models/$(MODEL) train.micro_batch_size=$$((8 / ranks))

# Runs that are done are not done again: the command goes on where it was stopped.
study-small: $(VENV)/installed
	DS_ACCELERATOR=cpu TQDM_DISABLE=1 python -m recipes.quickstart.get_model smollm2 models/smollm2
	python -m benchmarks.study run benchmarks/studies/a_small.yaml --together 2 \
		--results runs/studies/a_small.json

# Two test processes; tests/conftest.py says which tests share one.
PYTEST := python -m pytest -n 2

# No test that starts processes, and three of the architectures.
test-fast: $(VENV)/dev
	$(PYTEST) -m 'not slow and not long and not exhaustive and not suite'

test: $(VENV)/dev
	$(PYTEST)

# Kills runs at every moment in every mode, not only at some.
test-long: $(VENV)/dev
	python -m pytest -m long --capture=no

# One table at the end, everything in GPU_RESULT. Only what is missing from $(VENV) is downloaded.
GPU_RESULT ?= runs/gpu.json
gpu: $(VENV)/dev
	python -m tests.gpu --output $(GPU_RESULT)

lint: $(VENV)/dev
	ruff check .
	ruff format --check .

types: $(VENV)/dev
	mypy

# Rewrites the committed curves of the pinned tiny run; say in the commit why they changed.
golden: $(VENV)/dev
	python -m tests.test_golden

# Rewrites docs/metrics.md from the metrics that the code declares.
metrics: $(VENV)/dev
	python -m tests.test_metrics

# Rewrites docs/exports.md from the files that tiny models of every class are published as.
exports: $(VENV)/dev
	python -m tests.export_names
