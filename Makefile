# Two commands for a new user: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
PORT ?= 3000
BIN := .venv/bin
export DAGSTER_HOME := $(CURDIR)/.dagster_home
SETTINGS := .dagster_home/dagster.yaml# relative: make cannot have a target whose path holds a space
export DAGSTER_DISABLE_TELEMETRY := 1
export NO_MKDOCS_2_WARNING := 1
unexport PYTHONDONTWRITEBYTECODE # images set it; every process would compile PyTorch and transformers again, for 20 s
CORE := .venv/.core-installed
EXTRAS := .venv/.extras-installed
DOCS := .venv/.docs-installed
LMMS_EVAL := .lmms-eval/.installed
# Three test processes on two cores, for most tests wait for subprocesses. Each file stays in one process, and files run in
# the order of their folders: those of long tests first, so that in the end no process works on while the others are done
PYTEST = env -u DAGSTER_HOME $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder
TORCH_UNITS := $(addprefix training/,caches encoding loop models runs/test_model_directory.py) evaluation/test_predict_shuffling.py inference/test_batches.py
FAST := tests/unit $(TORCH_UNITS:%=--ignore=tests/unit/%) -m 'not slow and not bench and not gpu and not not_fast'

.PHONY: demo test test-fast test-newest collect test-all chromium postgres faketime lmms-eval check docs dev bench bench-quick load torture attack install constraints clean

demo: $(CORE) $(SETTINGS) ## the whole line of emoji_sft, raw images to released model
	$(BIN)/mllm-assets run emoji_sft

test: $(CORE) ## unit and integration tests
	$(PYTEST)

test-fast: $(CORE) ## unit tests without torch and without whole datasets: under a minute on two cores
	$(PYTEST) $(FAST)

test-newest: $(CORE) ## the same on the newest Python of this machine, in .venv/newest; FETCH=--fetch lets uv get one
	env -u DAGSTER_HOME PYTHONPATH="$(CURDIR)" $(BIN)/python .ci/newest.py $(FETCH) -n 3 --dist loadfile --no-loadscope-reorder $(FAST)

collect: $(CORE)
	@collected=$$(env -u DAGSTER_HOME $(BIN)/pytest --collect-only -qq) || { echo "$$collected"; exit 1; }

test-all: $(EXTRAS) chromium postgres faketime lmms-eval ## everything, the browser included
	$(PYTEST) tests -m 'not bench and not gpu'

check: $(EXTRAS) ## style, types, sound definitions and YAML files, packages without known vulnerabilities
	@git rev-parse --git-dir > /dev/null || { echo "The checks ask git for the files. In a copy without git: git init && git add -A"; exit 1; }
	$(BIN)/pre-commit run --all-files
	$(BIN)/dg check yaml
	$(BIN)/dg check defs
	$(BIN)/mllm-assets check-graph
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/python .ci/audit.py

docs: $(DOCS) ## the documentation on http://127.0.0.1:8000
	$(BIN)/mkdocs serve -a 127.0.0.1:8000

dev: $(CORE) $(SETTINGS) ## the Dagster UI on http://127.0.0.1:3000; another port: make dev PORT=3001
	$(BIN)/dg dev -h 127.0.0.1 -p $(PORT)

bench: $(CORE)
	$(BIN)/python benchmarks/load_graph.py
	$(BIN)/python benchmarks/step_processes.py
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/ingest.py --memory
	PYTHONPATH="$(CURDIR)" $(BIN)/python -m benchmarks.llava_rows
	$(BIN)/python benchmarks/train_speed.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/grouping.py

bench-quick: $(CORE) ## loading the graph and a training step: 2 minutes where nothing else runs
	$(BIN)/python benchmarks/load_graph.py --rounds 3
	$(BIN)/python benchmarks/train_speed.py --quick

load: $(EXTRAS) ## the server under hundreds of clients; the table is in benchmarks/RESULTS.md
	$(BIN)/python benchmarks/serving_load.py --keep

torture: $(CORE) ## twenty kills -9 of each kind of run at random moments; about 10 minutes
	PYTHONPATH="$(CURDIR)" $(BIN)/python -m benchmarks.torture --jobs 2

attack: $(EXTRAS) faketime ## every test that attacks the product; the table is benchmarks/attacks.md
	env -u DAGSTER_HOME PYTHONPATH="$(CURDIR)" $(BIN)/python -m benchmarks.attack

install: $(CORE)

define VENV
@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}. Try: make PYTHON=python3.12 ...")'
@$(PYTHON) -m venv .venv
endef

$(CORE): pyproject.toml constraints.txt
	@echo "Installing PyTorch, transformers, Dagster and their dependencies into .venv (under a minute on a fast line)"
	$(VENV)
	@$(BIN)/python .ci/install.py -c constraints.txt -e '.[dev]'
	@touch $@

$(EXTRAS): $(CORE) requirements-ui.txt
	@echo "Installing what the extras need (Ray, MLflow, Playwright, MkDocs, ...) into .venv (a few minutes)"
	@$(BIN)/python .ci/install.py -c constraints.txt -e '.[dev,e2e,docs,sweep,labels,mlflow,wandb,ray,serve,s3,gs,abfs,postgres,k8s,qlora,int8,video]'
	@$(BIN)/python .ci/install.py --no-deps -r requirements-ui.txt
	@touch $@

# the pages of reference are made from the code, and the graph loads without PyTorch
$(DOCS): pyproject.toml constraints.txt
	$(VENV)
	@$(BIN)/python .ci/install.py --excludes .ci/without-torch.txt -c constraints.txt -e '.[docs]'
	@touch $@

chromium:
	@command -v chromium >/dev/null || { echo "installing Debian's chromium for the browser test"; apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }

postgres:
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { echo "installing Debian's postgresql for the test of Dagster's storage"; apt-get update -qq && apt-get install -y -qq postgresql >/dev/null; }

faketime:
	@ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || { echo "installing Debian's faketime for the tests of a clock that is set"; apt-get update -qq && apt-get install -y -qq faketime >/dev/null; }

lmms-eval: $(LMMS_EVAL)

# its own environment, and the large packages of .venv by a link: 58 MB instead of 6 GB
$(LMMS_EVAL): $(EXTRAS) .ci/lmms-eval.txt
	@echo "Installing lmms-eval into .lmms-eval for the test of benchmarks (seconds)"
	@rm -rf $(@D)
	@$(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(@D)/venv.pth
	@mv $(@D)/venv.pth "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@$(@D)/bin/python .ci/install.py --no-deps -r .ci/lmms-eval.txt
	@touch $@

# With DAGSTER_HOME set only the dagster.yaml in it counts, and without one the pool limits are gone
$(SETTINGS): dagster.yaml
	@mkdir -p $(@D)
	@ln -sf ../dagster.yaml $@

constraints: $(EXTRAS)
	@{ echo "# The exact versions that this project is tested with; regenerate with: make constraints"; \
	   $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -v '^pip=='; } > constraints.txt

clean: ## what was made here; not the data of the user's own
	rm -rf .venv .lmms-eval .dagster_home build dist *.egg-info
