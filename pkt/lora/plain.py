"""A LoRA that starts without an extraction: PEFT's own initialisations, read as pairs that `inject` puts into the student."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pkt.adapters import Adapter, Pair, from_peft, parameter_name
from pkt.errors import PktError
from pkt.extras import needs
from pkt.lora.factors import layer_of, lora_parameters
from pkt.lora.pissa import pissa_pairs
from pkt.lora.record import Mode, name_of, parameter_of
from pkt.lora.wrapping import ADAPTER, expected_warnings, lora_config, wrap
from pkt.models import Target, quiet, spec_of_model
from pkt.options import Lora
from pkt.seeds import Seeds

# PEFT's names. B is 0 in the first, BA is 0 in the second, and −BA goes into the base in the others.
DRAWN = ("default", "gaussian")
NEUTRAL = ("orthogonal", "eva")
SHIFTING = ("pissa", "olora", "corda", "lora_ga")
FAST_PISSA = re.compile(r"pissa_niter_\d+")
# What an initialisation that looks at data is shown, as PEFT's examples do.
ROWS, ROWS_AT_ONCE = 256, 4


def check_init(lora: Lora) -> None:
    """Refuse an initialisation that PEFT does not have, or whose training is more than a LoRA's."""
    reasons = {
        "loftq": "it replaces the base by a quantized one, so that the result would be no LoRA of the student",
        "mica": "its B is frozen while it trains, which is not plain LoRA",
    }
    if lora.init in reasons:
        raise PktError(f"init={lora.init!r}: {reasons[lora.init]}; train it with PEFT itself")
    if lora.init not in (*DRAWN, *NEUTRAL, *SHIFTING) and not FAST_PISSA.fullmatch(lora.init):
        names = ", ".join((*DRAWN, *NEUTRAL, *SHIFTING, "pissa_niter_N"))
        raise PktError(f"init={lora.init!r} is none of PEFT's initialisations; choose one of {names}")
    if lora.init == "corda":
        needs("attr", "train", "start from CorDA, as PEFT does it")
    if lora.init == "orthogonal" and lora.rank % 2:
        raise PktError(f"init='orthogonal' needs an even rank, not {lora.rank}")


def mode_of(lora: Lora) -> Mode:
    """How such a start is injected, so that step 0 is the student: BA is 0, or −BA stands in the base."""
    return "add" if lora.init in (*DRAWN, *NEUTRAL) else "residual"


def draw_pairs(
    student: nn.Module,
    targets: Sequence[Target],
    lora: Lora,
    a_scale: float,
    *,
    rows: Seeds | None = None,
    seed: int = 0,
) -> dict[str, Pair]:
    """The factors that PEFT starts these matrices with, scales folded into B; the student's weights are left as they were.

    Each A of a linear layer is PEFT's times `a_scale`, its B divided by it; embeddings keep PEFT's start. rows: what an
    initialisation that looks at data is shown (its first 256). pissa is pkt's own, without PEFT's full SVDs and not for experts,
    which keep PEFT's default. The random numbers are torch's global ones. Raises `PktError` where PEFT cannot start a matrix so.
    """
    spec = spec_of_model(student)
    largest = max(min(t.shape) for t in targets)
    if lora.rank > largest:
        raise PktError(
            f"rank={lora.rank} is above the smaller side of every matrix adapted (at most {largest}); use less"
        )
    blank = {t.module: _blank(t, lora.rank) for t in targets}
    config = Adapter(blank, name_of(student), spec.head if spec.tied else None).config(alpha=lora.alpha)
    config["init_lora_weights"] = True if lora.init in ("default", "pissa") else lora.init
    untouched = lora.init in (*DRAWN, *NEUTRAL, "pissa")
    weights = {} if untouched else {m: parameter_of(student, parameter_name(m, p)) for m, p in blank.items()}
    kept = [(weight, weight.detach().clone()) for weight in weights.values() if weight is not None]
    try:
        model = _started(student, config, lora.init, rows)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise PktError(
            f"init={lora.init!r}: PEFT cannot start this student so ({error}); choose another, or other modules"
        ) from error
    pairs = {}
    for module, pair in blank.items():
        found = lora_parameters(model, module, pair, ADAPTER)
        assert found is not None
        a, b = (t.detach().clone() for t in from_peft(*found, pair.experts))
        pairs[module] = Pair(a, b * layer_of(model, module, pair).scaling[ADAPTER], pair.kind)
    if lora.init == "pissa":
        pairs |= pissa_pairs(model, seed=seed, only={m for m, p in pairs.items() if p.kind != "embedding"})
    model.unload()
    with torch.no_grad():
        for weight, before in kept:
            weight.copy_(before)
    return {m: p if p.kind == "embedding" else Pair(p.A * a_scale, p.B / a_scale, p.kind) for m, p in pairs.items()}


def _started(student: nn.Module, config: dict[str, Any], init: str, rows: Seeds | None) -> Any:
    """The student wrapped with an adapter at PEFT's start."""
    import peft

    shown = Seeds([] if rows is None else list(rows[:ROWS]), "", 0 if rows is None else rows.pad_id)
    batches = shown.batches(1 if init == "corda" else ROWS_AT_ONCE)  # CorDA takes one row at a time
    if init == "eva":
        config["eva_config"] = peft.EvaConfig(rho=1.0)  # one rank for all
    elif init == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config["corda_config"] = CordaConfig()

        def look() -> None:
            with torch.no_grad():
                for batch in batches:
                    student(**batch, use_cache=False)

        preprocess_corda(student, lora_config(config), run_model=look)
    elif init == "lora_ga":
        config["lora_ga_config"] = peft.LoraGAConfig()

        def learn() -> None:
            for batch in batches:
                student(**batch, use_cache=False).loss.backward()

        peft.preprocess_loraga(student, lora_config(config), learn)
    model = wrap(student, config)
    if init == "eva":
        with quiet(), expected_warnings():
            peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def _blank(target: Target, rank: int) -> Pair:
    """Factors of a matrix without numbers: what PEFT is told of it."""
    rows, cols = target.shape if target.kind != "embedding" else target.shape[::-1]
    experts = (target.experts,) if target.experts else ()
    return Pair(torch.empty(*experts, rank, cols), torch.empty(*experts, rows, rank), target.kind)
