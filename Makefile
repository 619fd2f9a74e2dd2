# `make` lists the targets. Only Python >= 3.11, git and make are needed; .venv/ is built from requirements.lock.
PYTHON ?= python3
VENV   ?= .venv
TORCH  := 2.13.0
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CORES  := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
# A chapter takes one core and about 1 GB: as many workers as cores, four at most.
WORKERS ?= $(shell [ $(CORES) -lt 4 ] && echo $(CORES) || echo 4)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-long test browser bench gpu torture check lab docs lock address clean

# Data sets that are made or downloaded stay inside the checkout.
export MINARI_DATASETS_PATH ?= $(CURDIR)/data/minari
# Draw MuJoCo frames without a display where the system can.
ifneq ($(shell ldconfig -p 2>/dev/null | grep -c 'libEGL\.so'),0)
export MUJOCO_GL ?= egl
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## train BDPO on a maze from scratch and show what it learned (no GPU needed)
	$(BIN)/bdpo demo

demo-long: $(READY) ## the same with a longer training run
	$(BIN)/bdpo demo --preset long

# Chapters run side by side, one thread each. Everything runs even if something fails, so that one run shows it all.
test: export OMP_NUM_THREADS = 1
test: export CUDA_VISIBLE_DEVICES =
test: $(READY) ## execute every chapter and run the tests
	@failed=; $(BIN)/ruff check -q --output-format concise bdpo_lit tests bench || failed="$$failed ruff"; \
	$(BIN)/nbdev-test --n-workers $(WORKERS) --timing || failed="$$failed chapters"; \
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 || failed="$$failed pytest"; \
	[ -z "$$failed" ] || { echo "Failed:$$failed"; exit 1; }

# Without Chromium or Playwright these tests are skipped; here they must run.
browser: $(READY) ## use the moving pictures and JupyterLab as a reader does, in Chromium
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/pip install -qq 'playwright>=1.50'
	@for b in chromium chromium-browser google-chrome google-chrome-stable chrome; do command -v $$b >/dev/null && exit 0; done; \
	$(BIN)/python -c 'from pathlib import Path; from playwright.sync_api import sync_playwright as p; \
	with_ = p().start(); found = Path(with_.chromium.executable_path).exists(); with_.stop(); raise SystemExit(not found)' || \
	{ echo "No Chromium was found. Either: apt install chromium. Or: $(BIN)/playwright install --with-deps chromium"; exit 1; }
	$(BIN)/pytest --durations=5 tests/test_explore.py tests/test_jupyter.py

bench: $(READY) ## measure speed, ten minutes (BENCH=--full: an hour); FLOWRL=clone-of-flow-rl adds the JAX code (builds .venv-jax/)
	@[ -z "$(FLOWRL)" ] || [ -e .venv-jax/.ready ] || { $(PYTHON) -m venv .venv-jax && \
	.venv-jax/bin/pip install -qq -r bench/requirements-jax.txt && touch .venv-jax/.ready; }
	$(BIN)/python bench/run.py $(if $(FLOWRL),--jax .venv-jax/bin/python --flowrl "$(FLOWRL)") $(BENCH)

# The JAX code has an environment of its own, as in bench, but with CUDA. GPU= takes options: make gpu GPU="--parts tests"
gpu: $(READY) ## all that wants a GPU, a quarter of an hour; FLOWRL=clone-of-flow-rl adds the JAX code
	@[ -z "$(FLOWRL)" ] || [ -e .venv-jax-gpu/.ready ] || { $(PYTHON) -m venv .venv-jax-gpu && \
	.venv-jax-gpu/bin/pip install -qq -r bench/requirements-jax.txt 'jax-cuda12-plugin[with-cuda]==0.5.3' && \
	touch .venv-jax-gpu/.ready; }
	$(BIN)/python bench/gpu.py $(if $(FLOWRL),--jax .venv-jax-gpu/bin/python --flowrl "$(FLOWRL)") $(GPU)

torture: $(READY) ## kill runs, damage files, fill disks, train for an hour: hours; TORTURE="--parts kill --count 10"
	$(BIN)/python tests/torture.py $(TORTURE)

check: $(READY) ## package in step with the chapters, notebooks clean, links, ruff (two minutes)
	$(BIN)/ruff check -q --output-format concise bdpo_lit tests bench
	$(BIN)/pytest -q tests/test_chapters.py tests/test_pages.py

lab: $(READY) ## open the chapters in JupyterLab
	$(BIN)/jupyter lab nbs

docs: $(READY) ## build the site into _docs/ (needs Quarto)
	@command -v quarto >/dev/null || { echo "The site is built by Quarto, which is not installed: get it from https://quarto.org/docs/get-started/ and run make docs again."; exit 1; }
	$(BIN)/python -W ignore -m bdpo_lit._site

lock: ## resolve the dependencies anew in a fresh environment and write requirements.lock
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	$(PYTHON) -m venv "$$tmp" && \
	"$$tmp"/bin/pip install -qq torch==$(TORCH) && \
	"$$tmp"/bin/pip install -qq -e '.[dev]' && "$$tmp"/bin/pip check && \
	{ echo "# The tested environment, written by \`make lock\` (torch $(TORCH) first, then the project with its dev extra,"; \
	  echo "# in a fresh virtual environment; CUDA packages are left out, torch asks for those it needs). Use:"; \
	  echo "#   pip install -r requirements.lock && pip install --no-deps -e ."; \
	  "$$tmp"/bin/pip freeze --all --exclude-editable --exclude pip --exclude bdpo_lit \
	  | sed -E 's/\+[a-z0-9.]+$$//' | grep -vE '^(nvidia-|cuda-|triton)' | LC_ALL=C sort -f; } > requirements.lock
	@echo "requirements.lock: $$(grep -vc '^#' requirements.lock) packages"

address: $(READY) ## change the repository's address everywhere: make address URL=https://github.com/user/repo
	@echo '$(URL)' | grep -qE '^https://github\.com/[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$$' || { echo "usage: make address URL=https://github.com/user/repo"; exit 2; }
	@old=$$(sed -nE 's#^Repository = "https://github.com/([^"]+)".*#\1#p' pyproject.toml); \
	new='$(URL)'; new=$${new#https://github.com/}; \
	site() { echo "$${1%/*}.github.io/$${1#*/}"; }; \
	git grep -lF -e "$$old" -e "$$(site $$old)" | while read -r f; do \
	  sed -i.bak -e "s#$$(site $$old)#$$(site $$new)#g" -e "s#$$old#$$new#g" "$$f" && rm "$$f.bak"; done; \
	sed -i.bak -e "s#^user = .*#user = $${new%/*}#" -e "s#^repo = .*#repo = $${new#*/}#" settings.ini && rm settings.ini.bak; \
	$(BIN)/nbdev-export && git diff --stat

clean: ## remove what can be made again: builds, caches, the generated site (not .venv/, data/, runs/)
	rm -rf build dist *.egg-info _proc _docs nbs/nbdev.yml .quarto .ruff_cache .hypothesis .pytest_cache
	find bdpo_lit tests nbs -name __pycache__ -o -name .ipynb_checkpoints -o -name .pytest_cache | xargs rm -rf

$(READY): requirements.lock pyproject.toml bdpo_lit/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Preparing $(VENV)/ from requirements.lock (once: a few minutes and 1.5 GB, more where torch comes with CUDA)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq -r requirements.lock
	$(BIN)/pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
