"""From a trained adapter, however it was injected, to one plain LoRA for the original student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.adapters import Adapter, Pair, adapter_from_state, apply_kinds, check_fit, kinds_of, read_adapter, split_tied
from pkt.errors import PktError
from pkt.extraction import versions
from pkt.models import ModelSpec, spec_of, spec_of_model
from pkt.storage import MANIFEST, atomic_folder, check_output_folder, read_json, write_json
from pkt.version import __version__

FORMAT = "pkt-adapter-1"
INITIAL = "pkt_initial"


def finalize(
    model_or_dir: Any, out: str | Path, *, student: Any = None, rank: int | None = None, force: bool = False
) -> Adapter:
    """Write one plain LoRA folder, alpha = r, that gives the trained model's logits on the ORIGINAL student.

    model_or_dir: a PeftModel made by `pkt.inject`, a run folder of `pkt train`, or any trainer's checkpoint of it. student:
    the original student (directory, configuration or model) when the folder does not name one that exists. rank: recompress
    every pair to this rank, the best in the Frobenius norm; otherwise paired and residual give rank 2r, exactly.

    Raises `PktError` when the injection is not known, the factors are not finite, or `out` holds something else.
    """
    check_output_folder(out, force=force)
    adapter, mode, initial = _read(model_or_dir)
    spec = _student_spec(model_or_dir, student, adapter)
    if spec is not None:
        adapter = split_tied(adapter, spec.head if spec.tied else None)
        adapter.tied_head = spec.head if spec.tied else None
        adapter = apply_kinds(adapter, kinds_of(spec, adapter.pairs))
        check_fit(adapter.pairs, spec, "the adapter")
    if mode == "residual":
        if initial is None or set(initial) != set(adapter.pairs):
            raise PktError(
                "the initial factors of this residual adapter are missing; finalize the run folder, not a copy of its weights"
            )
        pairs = {m: _concatenate(p, initial[m]) for m, p in adapter.pairs.items()}
        adapter = Adapter(pairs, adapter.base, adapter.tied_head)
    lost: dict[str, float] = {}
    if rank is not None:
        adapter, lost = recompress(adapter, rank)
    with atomic_folder(out, force=force) as scratch:
        adapter.write(scratch, metadata={"pkt": FORMAT})
        manifest = {"format": FORMAT, "kind": "adapter", "mode": mode, "base": adapter.base, "versions": versions()}
        write_json(
            scratch / MANIFEST, {**manifest, "lost": lost, "ranks": {m: p.rank for m, p in adapter.pairs.items()}}
        )
        (scratch / "README.md").write_text(CARD.format(base=adapter.base, version=__version__), encoding="utf-8")
    return adapter


CARD = """---
library_name: peft
base_model: {base}
tags: [lora, peft, pkt]
---

# LoRA for {base}

A plain LoRA adapter (alpha = r) finalized by pkt {version}. Load it on the original model:
`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), DIR)`.
"""


def _read(source: Any) -> tuple[Adapter, str, dict[str, Pair] | None]:
    if isinstance(source, nn.Module):
        return _read_model(source)
    folder = Path(source)
    run = next((f for f in (folder, folder.parent) if (f / MANIFEST).is_file()), None)
    manifest = {} if run is None else read_json(run / MANIFEST)
    kind = manifest.get("kind")
    if kind == "extraction" and run == folder:
        raise PktError(
            f"{folder} is an extraction, not a trained adapter; train it first (pkt train), or load it with PEFT as it is"
        )
    if kind not in ("run", "adapter"):
        raise PktError(
            f"{folder}: pkt cannot tell how this adapter was injected (no run manifest beside it); finalize the run folder "
            "that `pkt train` wrote, or the model in memory"
        )
    adapter, _ = read_adapter(folder)
    mode = str(manifest["mode"])
    initial = None
    if mode == "residual" and kind == "run":
        assert run is not None
        if not (run / INITIAL).is_dir():
            raise PktError(
                f"{run} lacks its initial factors ({INITIAL}); without them a residual adapter cannot be finalized"
            )
        initial = read_adapter(run / INITIAL)[0].pairs
    return adapter, "plain" if kind == "adapter" else mode, initial


def _read_model(model: Any) -> tuple[Adapter, str, dict[str, Pair] | None]:
    from peft import get_peft_model_state_dict

    model = getattr(model, "_orig_mod", model)
    record = getattr(model, "pkt_injection", None)
    if not hasattr(model, "peft_config") or record is None:
        raise PktError("this model was not made by pkt.inject in this process; finalize the folder it was saved to")
    name = next(iter(model.peft_config))
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    adapter = adapter_from_state(state, model.peft_config[name].to_dict(), "the model's adapter")
    return adapter, record["mode"], record["initial"]


def _student_spec(source: Any, student: Any, adapter: Adapter) -> ModelSpec | None:
    if student is not None:
        return spec_of(student)
    if isinstance(source, nn.Module):
        return spec_of_base(source)
    if adapter.base and Path(adapter.base).is_dir():
        return spec_of(adapter.base)
    raise PktError(
        f"{source} names {adapter.base or 'no model'} as its student, not a directory here; pass the original student (--student)"
    )


def spec_of_base(model: Any) -> ModelSpec:
    """The spec of the plain student inside a PeftModel: wrapped layers are read as the layers they wrap."""
    base = getattr(model, "_orig_mod", model).get_base_model()
    return spec_of(base.config) if hasattr(base, "config") else spec_of_model(base)


def _concatenate(trained: Pair, initial: Pair) -> Pair:
    """ΔW = BA − B₀A₀ as one pair of twice the rank."""
    a, b = initial.A.to(trained.A), initial.B.to(trained.B)
    return Pair(torch.cat([trained.A, a]), torch.cat([trained.B, -b], 1), trained.kind)


def recompress(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
    """Every pair at most at `rank`, by QR of both factors and an SVD of the small core (fp64).

    Returns the adapter and, per module, the relative Frobenius error of its change.
    """
    widest = max(p.rank for p in adapter.pairs.values())
    if not 1 <= rank <= widest:
        raise PktError(f"rank={rank} is not between 1 and {widest}, the rank of this adapter")
    pairs, lost = {}, {}
    for module, pair in adapter.pairs.items():
        if pair.rank <= rank:
            pairs[module], lost[module] = pair, 0.0
            continue
        q_b, r_b = torch.linalg.qr(pair.B.double())
        q_a, r_a = torch.linalg.qr(pair.A.double().t())
        u, s, vt = torch.linalg.svd(r_b @ r_a.t())
        keep = min(rank, len(s))
        pairs[module] = Pair(
            (vt[:keep] @ q_a.t()).to(pair.A.dtype).contiguous(),
            (q_b @ (u[:, :keep] * s[:keep])).to(pair.B.dtype),
            pair.kind,
        )
        lost[module] = float(s[keep:].norm() / s.norm()) if s.norm() > 0 else 0.0
    return Adapter(pairs, adapter.base, adapter.tied_head), lost
