"""pkt: parametric knowledge transfer between language models.

    sens = pkt.sensitivity(teacher, loader)      # what matters in the teacher, for a task
    plan = pkt.plan(sens, teacher, student)      # which part of it has the student's shape
    ext = pkt.extract(teacher, plan, rank=16)    # that part as LoRA factors
    model = pkt.inject(student, ext)             # the student, ready for any trainer
    pkt.finalize(model, "adapter")               # a plain LoRA for the original student

Importing pkt imports torch and nothing heavier; everything else is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pkt.errors import PktError, PktWarning
from pkt.version import __version__

if TYPE_CHECKING:
    from pkt.extraction import Extraction as Extraction
    from pkt.extraction import Start as Start
    from pkt.extraction import extract as extract
    from pkt.extraction.factorization import factorize as factorize
    from pkt.lora import finalize as finalize
    from pkt.lora import initialize_lora_weights as initialize_lora_weights
    from pkt.lora import initialize_pissa_weights as initialize_pissa_weights
    from pkt.lora import inject as inject
    from pkt.matching import Lineage as Lineage
    from pkt.matching import lineage as lineage
    from pkt.planning import TransferPlan as TransferPlan
    from pkt.planning import plan as plan
    from pkt.pruning import shrink as shrink
    from pkt.scoring import Sensitivity as Sensitivity
    from pkt.scoring import sensitivity as sensitivity
    from pkt.seeds import Seeds as Seeds
    from pkt.seeds import load_seeds as load_seeds
    from pkt.starting import start as start
    from pkt.targets import Targets as Targets
    from pkt.teaching import teach as teach
    from pkt.training import train as train
    from pkt.transferring import transfer as transfer
    from pkt.transplanting import transplant as transplant

# Modules are named after activities and functions after verbs, so no name here is also a submodule's.
_HOME = {
    "Extraction": "extraction",
    "Lineage": "matching",
    "Seeds": "seeds",
    "Sensitivity": "scoring",
    "Start": "extraction",
    "Targets": "targets",
    "TransferPlan": "planning",
    "extract": "extraction",
    "factorize": "extraction.factorization",
    "finalize": "lora",
    "initialize_lora_weights": "lora",
    "initialize_pissa_weights": "lora",
    "inject": "lora",
    "lineage": "matching",
    "load_seeds": "seeds",
    "plan": "planning",
    "sensitivity": "scoring",
    "shrink": "pruning",
    "start": "starting",
    "teach": "teaching",
    "train": "training",
    "transfer": "transferring",
    "transplant": "transplanting",
}

__all__ = ["PktError", "PktWarning", "__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"pkt.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pkt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
