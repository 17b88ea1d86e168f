"""From a trained adapter, however it was injected, to one plain LoRA for the original student.

paired and add are LoRAs of the original student already; residual becomes one, ΔW = BA − B₀A₀, by setting both products side by
side. ΔW is then factorized anew, A with orthonormal rows: the cancelling halves are gone, so rounding the factors to bf16 (a
server does it) costs a share of ΔW, not of the much larger B₀A₀. Every module gets the same rank, filled up with zeros, because
servers ignore rank and alpha patterns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt.adapters import Adapter, Pair, apply_kinds, check_fit, kinds_of, parameter_name, split_tied
from pkt.cards import FINALIZED, write_card
from pkt.errors import PktError
from pkt.extraction import Extraction
from pkt.files import MANIFEST, atomic_folder, check_apart, check_output_folder, is_stored, write_json
from pkt.lora.checking import TOLERANCE, Check, dtype_of, self_check, token_ids_of
from pkt.lora.recognition import Source, read_source
from pkt.lora.record import compare_sketch, subtract
from pkt.lora.wrapping import spec_of_base, unwrapped
from pkt.manifest import call_of, manifest_of, recorded_day, versions
from pkt.models import Model, ModelSpec, load_model, save_model, spec_of
from pkt.models.adapter_files import SHIFTED
from pkt.progress import bar


@dataclass(repr=False)
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
    asked = call_of(finalize, locals(), "out", "merge", "force")
    out = check_output_folder(out, force=force)
    merge = None if merge is None else check_output_folder(merge, force=force)
    if dtype not in TOLERANCE:
        raise PktError(f"dtype={dtype} is not a type for factors; choose float32, bfloat16 or float16")
    source = read_source(model_or_dir, extraction)
    original = _original(model_or_dir, student, source)
    _check_folders(out, merge, original, (model_or_dir, original, source.adapter.base, extraction, samples))
    spec = spec_of(original) if original is not None else spec_of_base(unwrapped(model_or_dir))
    _check_student(source, spec, original)
    result = _plain(source, spec, rank, dtype, embeddings=embeddings)
    with atomic_folder(out, force=force) as scratch:
        result.write(scratch)
        if not check:
            result.unchecked = "not asked for"
        elif original is None or not isinstance(original, (nn.Module, str, Path)):
            result.unchecked = "the original student's weights are not at hand; pass student="
        else:
            token_ids = token_ids_of(samples, original, spec)
            result.check = self_check(model_or_dir, source, scratch, original, token_ids)
            _judge(result, model_or_dir, original, exact=rank is None and embeddings)
        write_json(scratch / MANIFEST, _manifest(result, model_or_dir, asked))
        _write_card(scratch, result)
        if merge is not None:
            # Both are written whole before either is renamed into place.
            with atomic_folder(merge, force=force) as merged:
                entries = {"base": result.base, "given": asked, "versions": versions()}
                write_merged(merged, original, result.pairs, entries)
    return result


def _check_folders(out: Path, merge: Path | None, original: Any, read: Sequence[Any]) -> None:
    """Refuse output folders that overlap with each other or with what is read, and a merge without a student on disk."""
    if merge is not None:
        check_apart(out, merge)
        check_apart(merge, *filter(is_stored, read))
        if not isinstance(original, (str, Path)):
            raise PktError("a merged model is written from the original student's directory; pass student=DIR")
    check_apart(out, *filter(is_stored, read))


def _plain(source: Source, spec: ModelSpec, rank: int | None, dtype: torch.dtype, *, embeddings: bool) -> Finalized:
    """The source's change as a plain adapter of the original student, in `dtype`."""
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
    return Finalized(adapter.pairs, adapter.base, adapter.tied_head, source.mode, lost, dropped)


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
    with bar("finalizing", len(adapter.pairs), unit="modules") as advance:
        for done, (module, pair) in enumerate(adapter.pairs.items(), 1):
            if not anew and (rank is None or pair.rank <= rank):
                pairs[module], lost[module] = pair, 0.0
            else:
                pairs[module], lost[module] = _factorized(pair, rank or pair.rank)
            advance(done)
    return Adapter(pairs, adapter.base, adapter.tied_head), lost if rank is not None else {}


def _factorized(pair: Pair, rank: int) -> tuple[Pair, float]:
    """The best pair of at most this rank, and the relative Frobenius error of its change."""
    q_b, r_b = torch.linalg.qr(pair.B.double())
    q_a, r_a = torch.linalg.qr(pair.A.double().mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    keep = min(rank, s.shape[-1])
    made = Pair(
        (vt[..., :keep, :] @ q_a.mT).to(pair.A.dtype).contiguous(),
        (q_b @ (u[..., :keep] * s[..., None, :keep])).to(pair.B.dtype),
        pair.kind,
    )
    return made, float(s[..., keep:].norm() / s.norm()) if s.norm() > 0 else 0.0


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


def _judge(result: Finalized, trained: Any, student: Any, *, exact: bool) -> None:
    """Refuse an exact result whose logits are not the trained model's."""
    assert result.check is not None
    if isinstance(trained, nn.Module):
        dtype = dtype_of(trained)
        # Trained on 8 or 4 bits, checked on the full weights: the gap is the quantization's.
        exact = exact and not getattr(unwrapped(trained).get_base_model(), "is_quantized", False)
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


def _manifest(result: Finalized, trained: Any, asked: dict[str, Any] | None) -> dict[str, Any]:
    today = recorded_day(Path(trained) / MANIFEST) if is_stored(trained) else None
    entries = {
        "mode": result.mode,
        "base": result.base,
        "ranks": {m: p.rank for m, p in result.pairs.items()},
        "lost": result.lost,
        "left_out": result.dropped,
        "check": None if result.check is None else dataclasses.asdict(result.check),
        "given": asked,
        "versions": versions(),
        **({} if today is None else {"today": today.isoformat()}),
    }
    return manifest_of("adapter", entries)


def _write_card(folder: Path, result: Finalized) -> None:
    rank = max(p.rank for p in result.pairs.values())
    report = "\n".join(f"* {line}" for line in result.report())
    write_card(folder, FINALIZED, base=result.base, rank=rank, mode=result.mode, report=report)


def write_merged(
    folder: Path,
    student: str | Path,
    pairs: Mapping[str, Pair],
    entries: dict[str, Any],
    *,
    vectors: Mapping[str, Tensor] | None = None,
) -> None:
    """The whole student with the pairs' change added in fp32 and rounded once; a tied table gets it once.

    vectors: changes of other parameters, norms and biases, by name; entries: of the folder's manifest.
    """
    model = load_model(student)
    # Adding the change is subtracting its opposite.
    subtract(model, {m: Pair(p.A.float(), -p.B.float(), p.kind) for m, p in pairs.items()})
    with torch.no_grad():
        for name, change in (vectors or {}).items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.float() + change)
    save_model(model, folder, student)
    write_json(folder / MANIFEST, manifest_of("model", entries))
