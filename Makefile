# Every target makes .venv ready first; that is quick when nothing has changed, and repairs an interrupted set-up.
#   TORCH=auto|cpu|default  build of PyTorch when .venv is made: auto avoids gigabytes of CUDA where there is no NVIDIA GPU
#   PYTHON=python3.12       Python to make .venv with (3.11 to 3.14); otherwise one is found
#   JOBS=2                  notebooks and test files that run side by side
TORCH ?= auto
PYTHON ?=
JOBS ?= 2
root := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help setup lab test docs demo export lesson readme hooks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@sed -n 's/^#  /  /p' Makefile

setup: ## make or repair .venv, with everything that the other targets need
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh tools/setup.sh

lab: setup ## open the course in JupyterLab
	.venv/bin/python -m jupyterlab $(root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb

test: setup ## run every test: package, lessons, site
	.venv/bin/python -m pytest -n $(JOBS)
	.venv/bin/python docs/build.py

docs: setup ## build the site into _docs
	.venv/bin/python docs/build.py

demo: setup ## the first lesson without Jupyter: train a model on built-in text, measure it, let it write
	rm -rf runs/demo
	.venv/bin/bigmodel train --out runs/demo --minutes 1
	.venv/bin/bigmodel evaluate runs/demo
	.venv/bin/bigmodel generate runs/demo --prompt "The"

export: setup ## write the package from the notebooks
	.venv/bin/nbdev_export

lesson: setup ## export, run and save one lesson: make lesson NB=nbs/2_models/02_gpt.ipynb
	.venv/bin/python tools/lesson.py "$(NB)"

readme: setup ## write README.md from nbs/index.ipynb
	.venv/bin/python tools/readme.py

hooks: ## let git refuse commits whose notebooks are unclean or out of step with the package
	git config core.hooksPath .githooks

clean: ## remove .venv and all that was built
	rm -rf .venv _proc _docs build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis
