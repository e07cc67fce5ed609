# Every command sets up what it needs, in .venv; a set-up that is current takes no time.
#
#   make demo     train the quick-start detector on generated images, evaluate it, draw detections;
#                 demo-detectron2, demo-torchvision: on a host of your choice
#   make test     the tests
#   make lint     ruff, mypy, clang-format
#   make docs     the documentation's site, in build/site; a broken link is an error
#   make bench    the benchmarks, one after the other; QUICK=1: tiny sizes
#   make sanitize the operators' tests with AddressSanitizer, on a GPU with compute-sanitizer
#   make setup    the set-up alone
#   make clean    remove what was built; make distclean: the environment and all output as well
#
# PYTHON=python3.12 names the interpreter to set up with; a torch that it has and that fits is used.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
# A Python named on purpose, on the command line or in the environment, replaces an earlier one.
CHOSEN := $(if $(filter file,$(origin PYTHON)),,--interpreter-chosen)
SETUP = $(PYTHON) tools/setup_env.py $(CHOSEN)
OUTPUT ?= output/quickstart
CSRC := $(shell find csrc tests/cuda_emulator -name '*.cpp' -o -name '*.cu*' -o -name '*.h')
CLANG_FORMAT = $(VENV_PYTHON) -c 'import clang_format; clang_format.clang_format()'

.PHONY: demo demo-detectron2 demo-torchvision test lint docs bench sanitize setup clean distclean

demo: setup
	@if $(VENV_PYTHON) -c "import detectron2" 2>/dev/null; then \
		$(MAKE) --no-print-directory demo-detectron2; \
	else \
		echo "detectron2 is not installed: this is the demo of d2det.torchvision."; \
		$(MAKE) --no-print-directory demo-torchvision; \
	fi

demo-torchvision: setup
	$(VENV_PYTHON) -m d2det.torchvision --resume=auto --max-steps 700 --output $(OUTPUT)

demo-detectron2:
	@$(SETUP) --require detectron2
	$(VENV_PYTHON) train_net.py --config-file configs/quickstart.yaml OUTPUT_DIR $(OUTPUT)
	json=$$($(VENV_PYTHON) -m d2det.data.generated --split demo --num-images 8) && \
	$(VENV_PYTHON) demo.py --weights $(OUTPUT) --input "$$(dirname "$$json")/images" \
		--output $(OUTPUT)/demo

test: setup
	$(VENV_PYTHON) -m pytest -q

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy
	$(if $(CSRC),$(CLANG_FORMAT) --dry-run -Werror $(CSRC))

docs: setup  # not --quiet, which hides warnings from --strict
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict

bench: setup
	@for file in benchmarks/bench_*.py; do \
		echo "== $$file"; \
		$(VENV_PYTHON) "$$file" $(if $(QUICK),--quick) \
			--output "output/benchmarks/$$(basename "$$file" .py).md" || exit 1; \
	done

sanitize: setup
	$(VENV_PYTHON) tools/sanitize.py

setup:
	@$(SETUP)

clean:
	rm -rf build dist d2det.egg-info .pytest_cache .ruff_cache .mypy_cache d2det/_C*.so
	rm -f .venv/d2det-setup.json
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf .venv output
