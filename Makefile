# make run    the main job on the embedded model: dense and Camera-P at 0.2, 0.4, 0.6, then the table
# make test   the tests
# make test-cpus  the numerical tests as older CPUs run them: other vector widths, other sum orders
# make test-device  tests of the device, and those that leave the device to `auto`, with a fake
#             accelerator; needs a C++ compiler
# make test-gpu  on a real card: equality with the CPU, and measurements; writes gpu-report.json
# make cluster-test  a sweep each on SLURM, Ray, joblib and torchrun, some 10 minutes; SLURM needs
#             apt-get install slurm-wlm munge, and is left out without
# make docs   the documentation as a site: site/index.html, or with search python -m http.server -d site
# make clean  remove .venv, outputs and site
# All but help and clean set .venv up at their first call. ARGS adds to each, with settings of
# main.py or options of pytest: make run ARGS="sparsity=0.3", make test ARGS="tests/camera -x"

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TESTED := $(VENV)/.tested
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt
# what is large among what pip fetches: else nothing is said for minutes
SAY := sed -un 's/^ *Downloading \(.* MB)\).*/  \1/p'

.PHONY: help run test test-cpus test-device test-gpu cluster-test docs clean

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

run: $(READY)
	$(VENV)/bin/python main.py experiment=main $(ARGS)

test: $(TESTED)
	$(VENV)/bin/python -m pytest $(ARGS)

NUMERICAL := tests/baselines $(addprefix tests/camera/,calibration/scores compensation pruning \
	quantization pipeline/test_processes.py streaming/test_disk_experts.py)

test-cpus: $(TESTED)
	for level in default avx2; do \
		ATEN_CPU_CAPABILITY=$$level $(VENV)/bin/python -m pytest $(NUMERICAL) $(ARGS) || exit 1; \
	done

ON_DEVICE := $(addprefix tests/,camera/pipeline/test_resume.py camera/pipeline/test_compression.py \
	camera/pipeline/test_processes.py camera/pipeline/passes camera/evaluation camera/streaming \
	camera/checkpoint camera/runtime experiments/runs/test_runs.py experiments/bench)

test-device: $(TESTED)
	$(VENV)/bin/python -m pytest --accelerator=cuda $(ON_DEVICE) $(ARGS)
	$(VENV)/bin/python -m pytest --accelerator=camdev:2 tests/device $(ARGS)

test-gpu: $(TESTED)
	$(VENV)/bin/python -m pytest -m gpu $(ARGS)

cluster-test: $(TESTED)
	$(PIP) --quiet -e '.[all,ray,test]'
	$(VENV)/bin/python -m pytest -m cluster -n 0 -s -ra tests/cluster $(ARGS)

docs: $(READY)
	$(PIP) --quiet -e '.[docs]'
	$(VENV)/bin/python -m experiments.config.reference docs/settings.md
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict $(ARGS)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) can't make a virtual environment: install its venv package (Debian: python3-venv)"; exit 1; }
	@rm -f $@
	@echo "Setting up $(VENV), about two minutes and 3 GB:"
	@{ $(PIP) -e '.[all]' && touch $@; } | $(SAY)
	@test -e $@

$(TESTED): $(READY)
	@rm -f $@
	@echo "Adding the tools of the tests to $(VENV):"
	@{ $(PIP) -e '.[all,test]' && touch $@; } | $(SAY)
	@test -e $@

clean:
	rm -rf $(VENV) outputs site
