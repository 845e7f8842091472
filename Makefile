# Everything runs in .venv (tested versions: constraints.txt); `make test-latest` runs in .venv-latest (newest versions).
PYTHON ?= python3
VENV   := .venv/bin
LATEST := .venv-latest/bin
PORT   ?= 8000
export OMP_NUM_THREADS ?= 1
.DEFAULT_GOAL := help

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

site: .venv/ready  ## build the documentation from the notebooks into _docs/
	@$(VENV)/python site/build.py

serve:           ## show the built documentation at http://localhost:8000 (PORT=...)
	@echo "http://localhost:$(PORT)" && $(VENV)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _docs

lab: .venv/ready   ## open JupyterLab on the notebooks
	$(VENV)/jupyter lab --notebook-dir=nbs

test: .venv/ready  ## every check: exports in step, README in step, notebooks, tests/ with the site in a browser
	$(VENV)/python tests/in_step.py
	$(VENV)/nbdev_test --n_workers 2 --do_print
	$(VENV)/python site/build.py
	$(VENV)/python -m pytest -n 2 --dist loadfile

test-latest: .venv-latest/ready  ## the exported library with the newest fastai and torch that pip resolves
	$(LATEST)/python -m pytest -n 2 --dist loadfile tests/test_core.py tests/test_callback.py tests/test_interrupts.py tests/test_processes.py tests/test_ctrl_c.py tests/test_data.py tests/test_msam.py tests/test_roads.py tests/test_kill.py tests/test_example.py tests/test_ssam.py tests/test_reuse.py tests/test_saving.py tests/test_ids.py tests/test_history.py tests/test_saf.py tests/test_mesa.py tests/test_sharpness.py tests/test_hessian.py tests/test_slices.py tests/test_track.py tests/test_compare.py

export: .venv/ready  ## notebooks to sam_explained/
	$(VENV)/nbdev_export

readme: .venv/ready  ## README.md from nbs/index.ipynb
	$(VENV)/python site/readme.py

clean-nbs: .venv/ready  ## strip execution counts and stray metadata from the notebooks
	$(VENV)/nbdev_clean

hooks: .venv/ready  ## let git and Jupyter keep the notebooks clean
	$(VENV)/nbdev_install_hooks

bench: .venv/ready  ## what a step costs beside plain SGD: SAM, mSAM, a part of the weights, SAF, MESA; eigenvalues and slices
	$(VENV)/python benchmarks/two_pass.py
	$(VENV)/python benchmarks/shards.py
	$(VENV)/python benchmarks/suffix.py
	$(VENV)/python benchmarks/past.py
	$(VENV)/python benchmarks/eigen.py
	$(VENV)/python benchmarks/slices.py

claims: .venv/ready  ## the runs of the ledger, on from where they stopped (hours; several may run at once)
	$(VENV)/python benchmarks/claims/run.py choose
	$(VENV)/python benchmarks/claims/judge.py runs
	$(VENV)/python benchmarks/claims/judge.py shards
	$(VENV)/python benchmarks/claims/judge.py rate

clean:           ## remove what was built, keep the environments
	rm -rf _proc _docs build *.egg-info

.venv/ready: constraints.txt settings.ini setup.py
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-latest/ready: settings.ini setup.py
	test -x $(LATEST)/python || $(PYTHON) -m venv .venv-latest
	$(LATEST)/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e . pytest pytest-xdist hypothesis scipy curvlinops-for-pytorch pyarrow
	$(LATEST)/python -m pip list --disable-pip-version-check | grep -iE '^(torch|fastai|fastcore) '
	touch $@

.PHONY: help site serve lab test test-latest export readme clean-nbs hooks bench clean
