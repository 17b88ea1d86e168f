"""From a trained adapter, however it was injected, to one plain LoRA for the original student.

paired and add are LoRAs of the original student already; residual becomes one, ΔW = BA − B₀A₀, by setting both products side by
side. ΔW is then factorized anew, A with orthonormal rows: the cancelling halves are gone, so rounding the factors to bf16 (a
server does it) costs a share of ΔW, not of the much larger B₀A₀. Every module gets the same rank, filled up with zeros, because
servers ignore rank and alpha patterns.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt.adapters import (
    CONFIG,
    Adapter,
    Pair,
    adapter_from_state,
    apply_kinds,
    check_fit,
    kinds_of,
    parameter_name,
    read_adapter,
    split_tied,
)
from pkt.errors import PktError, PktWarning
from pkt.extraction import Extraction
from pkt.files import (
    MANIFEST,
    as_path,
    atomic_folder,
    check_apart,
    check_output_folder,
    is_stored,
    read_json,
    write_json,
)
from pkt.lora.injection import (
    SHIFTED,
    compare_sketch,
    name_of,
    parameter_of,
    put_adapter,
    record_of,
    spec_of_base,
    subtract,
)
from pkt.manifest import manifest_of, read_manifest, versions
from pkt.models import Model, ModelSpec, load_model, load_tokenizer, quiet, spec_of
from pkt.seeds import load_seeds
from pkt.version import __version__

INITIAL = "pkt_initial"  # folder with the factors that a residual adapter started from
# Largest logit difference of an exact result, relative to the largest logit: fp32, and half precision, where the base itself
# was rounded when B₀A₀ left it.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Check:
    """The result on the original student against the trained model, on a few samples."""

    samples: int
    tokens: int
    gap: float  # largest difference of a logit
    scale: float  # largest logit
    agreement: float  # share of positions with the same most likely token

    def __str__(self) -> str:
        return (
            f"against the trained model on {self.samples} samples ({self.tokens} tokens): logits differ by at most {self.gap:.1e} "
            f"(they reach {self.scale:.1f}), the same next token at {100 * self.agreement:.1f}% of positions"
        )


@dataclass
class Finalized(Adapter):
    """The adapter that was written, and what was measured on the way."""

    mode: str = "plain"
    lost: dict[str, float] = field(default_factory=dict)  # per module, ‖ΔW − BA‖ / ‖ΔW‖ of the recompression
    dropped: list[str] = field(default_factory=list)
    check: Check | None = None
    unchecked: str = ""  # why there is no check

    def report(self) -> list[str]:
        """What there is to say, in lines."""
        lines = []
        if self.dropped:
            lines.append(f"left out, with what they had learned: {', '.join(self.dropped)}")
        if self.lost:
            worst = max(self.lost, key=lambda m: self.lost[m])
            mean = sum(self.lost.values()) / len(self.lost)
            lines.append(
                f"recompression loses {100 * mean:.2f}% of a module's change on average, at most {100 * self.lost[worst]:.2f}% "
                f"({worst}), in the Frobenius norm"
            )
        lines.append(str(self.check) if self.check is not None else f"not checked: {self.unchecked}")
        return lines


@dataclass
class Source:
    """A trained adapter, with its scales folded into B, and how it was injected."""

    adapter: Adapter
    mode: str  # paired, residual, add or plain
    initial: dict[str, Pair] | None = None  # of a residual adapter
    record: dict[str, Any] = field(default_factory=dict)
    student: str | None = None  # the original student, as it was named
    how: str = ""  # what the mode was recognised by


def finalize(
    model_or_dir: Any,
    out: str | Path,
    *,
    student: Any = None,
    rank: int | None = None,
    embeddings: bool = True,
    merge: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    extraction: Extraction | str | Path | None = None,
    samples: Sequence[Sequence[int]] | str | Path | None = None,
    check: bool = True,
    force: bool = False,
) -> Finalized:
    """Write one plain LoRA folder, alpha = r, that gives the trained model's logits on the ORIGINAL student.

    model_or_dir: a PeftModel made by `pkt.inject`, a run folder, or any trainer's output folder or checkpoint. student: the
    original student (directory, configuration or model) when the folder does not name one that exists. rank: recompress every
    pair to this rank, the best in the Frobenius norm; otherwise paired and residual give rank 2r, exactly. embeddings=False
    leaves the embedding and the head out, for servers that refuse them. merge: also write the whole student with the change
    added, to this folder. dtype: of the factors written. extraction: what a residual adapter started from, when its folder
    lacks it. samples: token ids, or a JSONL file of rows, for the check of the logits (random ids by default).

    Raises `PktError` when the injection cannot be recognised, the student is not the one that was trained, the factors are
    not finite, an exact result does not reproduce the trained logits, or an output folder holds something else, overlaps
    with what is read, or does not fit on the disk. Nothing is left behind then: `out` and `merge` appear together.
    """
    out = check_output_folder(out, force=force)
    if merge is not None:
        merge = check_output_folder(merge, force=force)
        check_apart(out, merge)
    if dtype not in TOLERANCE:
        raise PktError(f"dtype={dtype} is not a type for factors; choose float32, bfloat16 or float16")
    source = read_source(model_or_dir, extraction)
    original = _original(model_or_dir, student, source)
    read = [g for g in (model_or_dir, original, source.adapter.base, extraction, samples) if is_stored(g)]
    for written in (out, merge):
        if written is not None:
            check_apart(written, *read)
    if merge is not None and not isinstance(original, (str, Path)):
        raise PktError("a merged model is written from the original student's directory; pass student=DIR")
    spec = spec_of(original) if original is not None else spec_of_base(_unwrapped(model_or_dir))
    _check_student(source, spec, original)
    adapter = fitted(source, spec)
    if source.initial is not None:
        source.initial = apply_kinds(Adapter(source.initial, ""), kinds_of(spec, source.initial)).pairs
    if source.mode == "residual":
        adapter = _difference(adapter, source)
    adapter, lost = refactor(adapter, rank, anew=source.mode in ("paired", "residual"))
    dropped: list[str] = []
    if not embeddings:
        adapter, dropped = _without_embeddings(adapter, spec)
    adapter = _rounded(adapter.padded(), dtype)
    result = Finalized(adapter.pairs, adapter.base, adapter.tied_head, source.mode, lost, dropped)
    with atomic_folder(out, force=force) as scratch:
        adapter.write(scratch)
        if not check:
            result.unchecked = "not asked for"
        elif original is None or not isinstance(original, (nn.Module, str, Path)):
            result.unchecked = "the original student's weights are not at hand; pass student="
        else:
            token_ids = _token_ids(samples, original, spec.vocab_size)
            result.check = self_check(model_or_dir, source, scratch, original, token_ids)
            _judge(result, model_or_dir, original, exact=rank is None and embeddings)
        write_json(scratch / MANIFEST, _manifest(result))
        (scratch / "README.md").write_text(_card(result), encoding="utf-8", newline="\n")
        if merge is not None:
            # Both are written whole before either is renamed into place.
            with atomic_folder(merge, force=force) as merged:
                _write_merged(merged, adapter, original)
    return result


def read_source(source: Any, extraction: Extraction | str | Path | None = None) -> Source:
    """The adapter in a model or a folder, and how it was injected. Raises `PktError` where that would be a guess."""
    if extraction is not None and not isinstance(extraction, Extraction):
        extraction = Extraction.load(extraction)
    if isinstance(source, nn.Module):
        found = _read_model(_unwrapped(source))
    else:
        found = _read_folder(as_path(source, "a trained model, or the path of its folder,"))
    if extraction is not None and found.mode != "residual":
        text = f"the extraction is not used: this adapter is {found.mode}, and only a residual one needs it"
        warnings.warn(text, PktWarning, stacklevel=3)
    if found.mode == "residual" and found.initial is None and extraction is not None:
        # An adapter of one's own configuration may use a part of the extraction.
        found.initial = {m: p for m, p in extraction.pairs.items() if m in found.adapter.pairs}
    if found.mode == "residual":
        where = "this model" if isinstance(source, nn.Module) else str(source)
        if found.initial is None:
            raise PktError(
                f"{where} is a residual adapter without its initial factors, so its change cannot be computed; finalize it inside "
                "its run folder, or name the extraction it started from (--extraction DIR)"
            )
        wanted = found.record.get("initial")
        if wanted is not None and wanted != Adapter(found.initial, "").fingerprint():
            raise PktError(
                f"the initial factors at hand are not those {where} started from; name the extraction it was injected from "
                "(--extraction DIR)"
            )
    return found


def _unwrapped(model: Any) -> Any:
    """The PeftModel inside a compiled or data-parallel wrapper."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return getattr(model, "_orig_mod", model)


def _read_model(model: Any) -> Source:
    from peft import get_peft_model_state_dict

    if not hasattr(model, "peft_config"):
        raise PktError(
            "this model carries no adapter; finalize what pkt.inject returned, or the folder it was saved to"
        )
    injected = getattr(model, "pkt_injection", {})
    active = [n for n in model.active_adapters if n in model.peft_config]
    name = next(iter(active or injected or model.peft_config))
    config = model.peft_config[name].to_dict()
    record = record_of(config)
    if record is None:
        raise PktError(
            f"the adapter {name!r} of this model was not made by pkt, so it needs no finalize; save it with PEFT, or make the "
            "injected adapter the active one (set_adapter)"
        )
    shifted = getattr(getattr(model.get_base_model(), "config", None), SHIFTED, None)
    if record["mode"] == "residual" and not shifted:
        raise PktError(
            f"the adapter {name!r} is residual but the base under it is not shifted, so this model is not the trained one; "
            "arm it first: pkt.inject(model, extraction, mode='residual')"
        )
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    adapter = adapter_from_state(state, config, "the model's adapter")
    return Source(
        adapter, record["mode"], injected.get(name, {}).get("initial"), record, record["student"], "its record"
    )


def _read_folder(folder: Path) -> Source:
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        raise PktError(f"{folder} is a model, not an adapter folder; name the folder that holds the trained adapter")
    run = next((f for f in (folder, *folder.absolute().parents[:2]) if (f / MANIFEST).is_file()), None)
    manifest = {} if run is None else read_manifest(run)
    kind = manifest.get("kind")
    if kind == "extraction" and run == folder:
        raise PktError(
            f"{folder} is an extraction, not a trained adapter; train it first (pkt train), or load it with PEFT as it is"
        )
    adapter, config = read_adapter(folder)
    record = record_of(config) or {}
    # The base a residual folder was trained on, when pkt wrote it as a complete student.
    base = Path(adapter.base) if adapter.base else None
    shifted = read_json(base / "config.json").get(SHIFTED) if base and (base / "config.json").is_file() else None
    if kind == "run":
        mode, student, how = str(manifest["mode"]), manifest.get("student"), f"{run}/{MANIFEST}"
        if record and record["mode"] != mode:
            raise PktError(
                f"{folder} was injected as {record['mode']}, but {how} says {mode}; it belongs to another run"
            )
    elif kind == "adapter" and run == folder:
        mode, student, how = "plain", adapter.base, f"its {MANIFEST}"
    elif record:
        mode, student, how = record["mode"], record["student"], f"the record in its {CONFIG}"
    elif shifted:
        mode, student, how = "residual", shifted["student"], f"the shifted base it was trained on, {base}"
        record = {"initial": shifted["initial"]}
    elif looks_paired(adapter):
        mode, student, how = "paired", adapter.base, "its factors: the second half is a pair of singular factors"
    else:
        raise PktError(
            f"{folder}: pkt cannot tell how this adapter was injected: no run manifest beside it, no record in its {CONFIG}, and "
            "its factors are not a paired adapter's. If pkt.inject made it, finalize the trainer's own output folder, or the "
            "model in memory; if not, it needs no finalize"
        )
    if mode != "residual":
        return Source(adapter, mode, None, record, student, how)
    places = [f / INITIAL for f in (run, base) if f is not None]
    initial = next((read_adapter(p)[0] for p in places if (p / CONFIG).is_file()), None)
    return Source(adapter, mode, None if initial is None else initial.pairs, record, student, how)


def looks_paired(adapter: Adapter) -> bool:
    """Whether each module's second half is an untouched [A₀], [−B₀]: orthogonal singular factors that mirror the first half.

    Training leaves no other LoRA with orthogonal rows and columns in one half of every module.
    """
    seen = False
    for a, b in (factors for pair in adapter.pairs.values() for factors in pair.each()):
        if not (a.any() or b.any()):
            # An expert that nothing feeds: its factors stay zero.
            continue
        half = len(a) // 2
        a0, b0 = a[half:].double(), -b[:, half:].double()
        if len(a) % 2 or not (_orthogonal(a0) and _orthogonal(b0.t())):
            return False
        mirrored = (a[:half].double() * a0).sum() > 0 and (b[:, :half].double() * b0).sum() > 0
        if not mirrored:
            return False
        seen = True
    return seen


def _orthogonal(rows: Tensor) -> bool:
    gram = rows @ rows.t()
    diagonal = gram.diagonal()
    if not (diagonal > 0).any():
        return False
    # Cosines between rows; rounding to bf16 leaves them under 2%.
    size = diagonal.clamp_min(1e-30).sqrt()
    cosines = gram / size / size[:, None]
    return float((cosines - torch.diag(cosines.diagonal())).abs().max()) < 0.02 if len(rows) > 1 else False


def _original(model_or_dir: Any, student: Any, source: Source) -> Any:
    """The original student, or None for a model in memory whose student is not on disk."""
    if student is not None:
        return student
    if source.student and Path(source.student).is_dir():
        return source.student
    if isinstance(model_or_dir, nn.Module):
        return None
    named = source.student or "no model"
    raise PktError(
        f"{model_or_dir} names {named} as its student, not a directory here; pass the original student (--student)"
    )


def _check_student(source: Source, spec: ModelSpec, original: Any) -> None:
    """Refuse a student that is not the one the adapter was injected into: a shifted base, or other weights."""
    shifted = spec.config.get(SHIFTED)
    if shifted and original is not None:
        raise PktError(
            f"{spec.name} is the shifted base of a residual injection (W − B₀A₀), not the original student; "
            f"finalize for {shifted['student']}"
        )
    if not source.record.get("sketch") or not isinstance(original, (nn.Module, str, Path)):
        return
    weights = original if isinstance(original, nn.Module) else Model.of(original)
    check_fit(
        source.adapter.pairs if not spec.tied else split_tied(source.adapter, spec.head).pairs, spec, "the adapter"
    )
    if "other" in compare_sketch(source.record["sketch"], weights, source.adapter.pairs).values():
        raise PktError(
            f"the weights of {spec.name} are not those the adapter was injected into ({source.student}): they were trained, "
            "merged or shifted since; finalize for the student it was injected into"
        )


def fitted(source: Source, spec: ModelSpec) -> Adapter:
    """The source's adapter with the student's kinds, its tied head folded into the embedding."""
    adapter = split_tied(source.adapter, spec.head if spec.tied else None)
    adapter = apply_kinds(adapter, kinds_of(spec, adapter.pairs))
    adapter.base = spec.name
    check_fit(adapter.pairs, spec, "the adapter")
    return adapter


def _difference(adapter: Adapter, source: Source) -> Adapter:
    """ΔW = BA − B₀A₀ as one pair of twice the rank."""
    assert source.initial is not None
    initial = source.initial
    if set(initial) != set(adapter.pairs):
        apart = sorted(set(initial) ^ set(adapter.pairs))
        raise PktError(
            f"the adapter and its initial factors list different modules ({', '.join(apart[:5])}); pass the right one"
        )
    pairs = {}
    for module, trained in adapter.pairs.items():
        a, b = initial[module].A.to(trained.A), initial[module].B.to(trained.B)
        pairs[module] = Pair(torch.cat([trained.A, a], -2), torch.cat([trained.B, -b], -1), trained.kind)
    return Adapter(pairs, adapter.base, adapter.tied_head)


def refactor(adapter: Adapter, rank: int | None, *, anew: bool = False) -> tuple[Adapter, dict[str, float]]:
    """Every pair at most at `rank`, by QR of both factors and an SVD of the small core (fp64): B = UΣ, A = Vᵀ.

    anew: also factorize the pairs that are small enough. Returns the adapter and, when a rank is given, per module the
    relative Frobenius error of its change.
    """
    widest = max(p.rank for p in adapter.pairs.values())
    if rank is not None and not 1 <= rank <= widest:
        raise PktError(f"rank={rank} is not between 1 and {widest}, the rank of this adapter")
    pairs: dict[str, Pair] = {}
    lost: dict[str, float] = {}
    for module, pair in adapter.pairs.items():
        if not anew and (rank is None or pair.rank <= rank):
            pairs[module], lost[module] = pair, 0.0
            continue
        q_b, r_b = torch.linalg.qr(pair.B.double())
        q_a, r_a = torch.linalg.qr(pair.A.double().mT)
        u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        keep = min(rank or pair.rank, s.shape[-1])
        pairs[module] = Pair(
            (vt[..., :keep, :] @ q_a.mT).to(pair.A.dtype).contiguous(),
            (q_b @ (u[..., :keep] * s[..., None, :keep])).to(pair.B.dtype),
            pair.kind,
        )
        lost[module] = float(s[..., keep:].norm() / s.norm()) if s.norm() > 0 else 0.0
    return Adapter(pairs, adapter.base, adapter.tied_head), lost if rank is not None else {}


def _without_embeddings(adapter: Adapter, spec: ModelSpec) -> tuple[Adapter, list[str]]:
    places = spec.by_module()
    dropped = [m for m in adapter.pairs if places[m].group == "embedding" or m == spec.head]
    pairs = {m: p for m, p in adapter.pairs.items() if m not in dropped}
    if not pairs:
        raise PktError("this adapter has nothing but embeddings; without them nothing is left")
    return Adapter(pairs, adapter.base), dropped


def _rounded(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    pairs = {m: Pair(p.A.to(dtype), p.B.to(dtype), p.kind) for m, p in adapter.pairs.items()}
    bad = [m for m, p in pairs.items() if not (p.A.isfinite().all() and p.B.isfinite().all())]
    if bad:
        raise PktError(f"the factors of {bad[0]} overflow {dtype}; write them in bfloat16 or float32")
    return Adapter(pairs, adapter.base, adapter.tied_head)


@torch.no_grad()
def self_check(
    model_or_dir: Any, source: Source, written: Path, student: Any, samples: Sequence[Sequence[int]] | None = None
) -> Check:
    """Logits of the written adapter on the original student, by plain PEFT, against those of the trained model."""
    in_memory = isinstance(model_or_dir, nn.Module)
    base: Any = student
    if not isinstance(student, nn.Module):
        base = load_model(student, dtype=_dtype_of(model_or_dir) if in_memory else None)
    if samples is None:
        samples = _random_samples(spec_of(base).vocab_size or 2)
    names = [parameter_name(m, p) for m, p in source.adapter.pairs.items()]
    # A trainer's checkpoint may carry base weights, and a residual one needs its base shifted: both are undone.
    found = {n: weight for n in names if base is student and (weight := parameter_of(base, n)) is not None}
    kept = {n: weight.detach().clone() for n, weight in found.items()}
    final = _with_adapter(base, written, samples)
    if in_memory:
        trained = _logits(_unwrapped(model_or_dir), samples)
    else:
        if source.initial is not None:
            subtract(base, source.initial)
        trained = _with_adapter(base, Path(model_or_dir), samples)
    for name, weight in kept.items():
        found[name].copy_(weight)
    gap = max(float((x - y).abs().max()) for x, y in zip(final, trained, strict=True))
    same = [(x.argmax(-1) == y.argmax(-1)).float() for x, y in zip(final, trained, strict=True)]
    agreement, scale = torch.cat(same, 1).mean(), max(float(y.abs().max()) for y in trained)
    return Check(len(samples), sum(len(s) for s in samples), gap, scale, float(agreement))


def _with_adapter(base: Any, folder: Path, samples: Sequence[Sequence[int]]) -> list[Tensor]:
    model = put_adapter(base, folder)
    try:
        return _logits(model, samples)
    finally:
        model.unload()


def _logits(model: Any, samples: Sequence[Sequence[int]]) -> list[Tensor]:
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        return [model(torch.tensor([list(s)], device=device), use_cache=False).logits.float().cpu() for s in samples]
    finally:
        model.train(training)


def _token_ids(samples: Any, student: Any, vocab_size: int | None) -> list[list[int]] | None:
    """The first rows of a file as token ids, or the ids given; raises `PktError` for what a model cannot read."""
    if samples is None:
        return None
    if isinstance(samples, (str, Path)):
        name = student if not isinstance(student, nn.Module) else name_of(student)
        samples = [example.input_ids for example in load_seeds(samples, load_tokenizer(name), limit=8)]
    try:
        rows = [torch.as_tensor(row) for row in samples]
        sound = all(r.ndim == 1 and len(r) and not r.is_floating_point() and r.min() >= 0 for r in rows)
    except (TypeError, ValueError, RuntimeError):
        sound = False
    if not sound or not rows:
        raise PktError(
            "samples must be one or more rows of token ids, such as [[5, 17, 3]], or the path of a JSONL file"
        )
    largest = max(int(r.max()) for r in rows)
    if vocab_size is not None and largest >= vocab_size:
        raise PktError(f"samples hold the token id {largest}, but the student embeds only {vocab_size}")
    return [r.tolist() for r in rows]


def _random_samples(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (4, 16), generator=generator).tolist()


def _dtype_of(model: Any) -> torch.dtype:
    base = _unwrapped(model).get_base_model()
    return next(
        (p.dtype for n, p in base.named_parameters() if ".lora_" not in n and p.is_floating_point()), torch.float32
    )


def _judge(result: Finalized, trained: Any, student: Any, *, exact: bool) -> None:
    """Refuse an exact result whose logits are not the trained model's."""
    assert result.check is not None
    if isinstance(trained, nn.Module):
        dtype = _dtype_of(trained)
        # Trained on 8 or 4 bits, checked on the full weights: the gap is the quantization's.
        exact = exact and not getattr(_unwrapped(trained).get_base_model(), "is_quantized", False)
    elif isinstance(student, nn.Module):
        dtype = next(student.parameters()).dtype
    else:
        dtype = Model.of(student).tensor(parameter_name(*next(iter(result.pairs.items())))).dtype
    written = next(iter(result.pairs.values())).A.dtype
    tolerance = max(TOLERANCE.get(dtype, 0.1), TOLERANCE[written])
    if exact and not result.check.gap <= tolerance * result.check.scale:
        raise PktError(
            f"the result does not reproduce the trained model ({result.check}); was the base changed since the injection, or "
            "more than the adapter trained? Nothing was written"
        )


def _manifest(result: Finalized) -> dict[str, Any]:
    entries = {
        "mode": result.mode,
        "base": result.base,
        "ranks": {m: p.rank for m, p in result.pairs.items()},
        "lost": result.lost,
        "left_out": result.dropped,
        "check": None if result.check is None else dataclasses.asdict(result.check),
        "versions": versions(),
    }
    return manifest_of("adapter", entries)


CARD = """---
library_name: peft
base_model: {base}
tags: [lora, peft, pkt]
---

# LoRA for {base}

A plain LoRA adapter of rank {rank} (alpha = r, no patterns) finalized by [pkt](https://pypi.org/project/pkt-transfer/) {version}
from a `{mode}` injection. Load it on the original model:
`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), DIR)`.

{report}
"""


def _card(result: Finalized) -> str:
    rank = max(p.rank for p in result.pairs.values())
    report = "\n".join(f"* {line}" for line in result.report())
    return CARD.format(base=result.base, rank=rank, version=__version__, mode=result.mode, report=report)


def _write_merged(folder: Path, adapter: Adapter, student: str | Path) -> None:
    """The whole student with the adapter's change added in fp32 and rounded once; a tied table gets it once."""
    model = load_model(student)
    # Adding the change is subtracting its opposite.
    subtract(model, {m: Pair(p.A.float(), -p.B.float(), p.kind) for m, p in adapter.pairs.items()})
    with quiet():
        model.save_pretrained(folder)
        if (Path(student) / "tokenizer_config.json").is_file():
            load_tokenizer(student).save_pretrained(folder)
    write_json(folder / MANIFEST, manifest_of("model", {"base": adapter.base, "versions": versions()}))
