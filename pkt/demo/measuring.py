"""The methods that the demo compares, each at its own learning rate and over the same seeds."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pkt.adapters import Pair
from pkt.extraction import Extraction
from pkt.lora import finalize, inject, load_with_adapter, wrap
from pkt.models import load_model, load_tokenizer
from pkt.options import Training
from pkt.seeds import Seeds, load_seeds
from pkt.training import evaluate, fit

ASSETS = Path(__file__).parent / "assets"
RATES = (3e-3, 1e-2)
BATCH = 32
EPOCHS = 2.0
TRAIN_ROWS, HELD_OUT = 512, 64
CHOOSING_SEED = 1000
METHODS = (
    "PKT: sensitivity window",
    "random window",
    "noise of the same size",
    "PiSSA: the student's own",
    "plain LoRA (B = 0)",
)

Start = Callable[[int], Any]  # training seed -> a model ready to train


def starts(ext: Extraction, random_window: Extraction, own: Extraction) -> dict[str, Start]:
    """The methods compared. All train the same modules at the same rank; the noise has PKT's singular values."""

    def injected(extraction: Extraction) -> Start:
        return lambda seed: inject(load_model(ASSETS / "student", dtype=torch.float32), extraction)

    def noise(seed: int) -> Any:
        return inject(load_model(ASSETS / "student", dtype=torch.float32), matched_noise(ext, seed))

    def plain(seed: int) -> Any:
        return wrap(load_model(ASSETS / "student", dtype=torch.float32), ext.adapter().config())

    return dict(zip(METHODS, (injected(ext), injected(random_window), noise, injected(own), plain), strict=True))


def matched_noise(ext: Extraction, seed: int) -> Extraction:
    """Random directions with the singular values of `ext`'s pairs: what is left of PKT when its content is taken out."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module, pair in ext.pairs.items():
        sizes = pair.B.norm(dim=0)  # split "b": the columns of B carry the singular values
        left = torch.linalg.qr(torch.randn(pair.B.shape, generator=generator))[0]
        right = torch.linalg.qr(torch.randn(pair.A.shape[::-1], generator=generator))[0]
        pairs[module] = Pair(right.t().contiguous(), left * sizes, pair.kind)
    return Extraction(pairs, ext.energies, ext.plan, ext.provenance)


def measure(name: str, folders: dict[str, Path], out: Path, seeds: int) -> dict[str, Any]:
    """One method in a process of its own, one thread: its learning rate, then its runs. PKT's first run is finalized too."""
    torch.set_num_threads(1)
    loaded = [Extraction.load(folders[key]) for key in ("PKT", "random", "own")]
    start = starts(loaded[0], loaded[1], loaded[2])[name]
    student, data = ASSETS / "student", ASSETS / "data"
    tokenizer = load_tokenizer(student)
    rows, test_rows = (load_seeds(data / file, tokenizer) for file in ("train.jsonl", "test.jsonl"))
    train_rows = rows_head(rows, TRAIN_ROWS)
    choice_rows = Seeds(list(rows[-HELD_OUT:]), rows.source, rows.pad_id)
    chosen: dict[float, float] = {}
    for rate in RATES:
        torch.manual_seed(CHOOSING_SEED)
        model = start(CHOOSING_SEED)
        train_quietly(model, train_rows, rate, CHOOSING_SEED, epochs=EPOCHS / 2)
        chosen[rate] = evaluate(model, choice_rows).nll
    rate = min(chosen, key=lambda r: chosen[r])
    runs, found = [], {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = start(seed)
        train_quietly(model, train_rows, rate, seed)
        runs.append(evaluate(model, test_rows, tokenizer=tokenizer, exact_match=True))
        if seed == 0 and name.startswith("PKT"):
            found["finalize_gap"] = _finalize(model, out, test_rows)
    return {
        "lr": rate,
        "choice_nll": {str(r): v for r, v in chosen.items()},
        "nll": [r.nll for r in runs],
        "exact_match": [r.exact_match for r in runs],
        **found,
    }


@torch.no_grad()
def _finalize(model: Any, out: Path, rows: Seeds) -> float:
    """Finalize, load with plain PEFT on the original student, and compare the logits."""
    with _silence():
        finalize(model, out / "adapter", force=True)
        served = load_with_adapter(ASSETS / "student", out / "adapter", dtype=torch.float32)
    ids = torch.tensor([rows[0].input_ids])
    return float((served(ids).logits - model.eval()(ids).logits).abs().max())


def rows_head(rows: Seeds, count: int = 32) -> Seeds:
    return Seeds(list(rows[:count]), rows.source, rows.pad_id)


def train_quietly(model: Any, rows: Seeds, rate: float, seed: int, epochs: float = EPOCHS) -> None:
    with _silence(), tempfile.TemporaryDirectory(prefix="pkt-demo-") as folder:
        options = Training(epochs, BATCH, BATCH, rate, warmup=0.1, scheduler="cosine", save_steps=None, seed=seed)
        fit(model, rows, Path(folder), options, quietly=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The demo trains two dozen times; transformers' notices would drown its own lines."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
