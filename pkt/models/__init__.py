"""Everything pkt knows about models of others: their names, files, tokenizers and shapes.

What needs torch is imported when it is first used, so that names and the headers of files are known without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pkt.models.tables import EXPERT_PARAMETERS as EXPERT_PARAMETERS
from pkt.models.tables import FUSED as FUSED
from pkt.models.tables import HEAD_COLUMNS as HEAD_COLUMNS
from pkt.models.tables import HEAD_NORMS as HEAD_NORMS
from pkt.models.tables import HEAD_ROWS as HEAD_ROWS
from pkt.models.tables import MIXERS as MIXERS
from pkt.models.tables import NAMED_ROLES as NAMED_ROLES
from pkt.models.tables import NORMS as NORMS
from pkt.models.tables import PEFT_EMBEDDINGS as PEFT_EMBEDDINGS
from pkt.models.tables import POSITION_TABLES as POSITION_TABLES
from pkt.models.tables import ROLES as ROLES
from pkt.models.tables import SIZES as SIZES
from pkt.models.tables import UNADAPTABLE as UNADAPTABLE
from pkt.models.tables import Kind as Kind
from pkt.models.tables import Runs as Runs
from pkt.models.tables import embedding_scale as embedding_scale
from pkt.models.tables import read_roles as read_roles
from pkt.models.tables import unit_offset as unit_offset

if TYPE_CHECKING:
    from pkt.models.checkpoint import CheckpointFiles as CheckpointFiles
    from pkt.models.checkpoint import NotStoredError as NotStoredError
    from pkt.models.checkpoint import Stored as Stored
    from pkt.models.checkpoint import all_tensors as all_tensors
    from pkt.models.huggingface import checked_device as checked_device
    from pkt.models.huggingface import quiet as quiet
    from pkt.models.huggingface import unwrap as unwrap
    from pkt.models.positions import position_limit as position_limit
    from pkt.models.reference import Model as Model
    from pkt.models.reference import hollow_model as hollow_model
    from pkt.models.reference import load_model as load_model
    from pkt.models.reference import load_tokenizer as load_tokenizer
    from pkt.models.reference import save_model as save_model
    from pkt.models.reference import spec_of as spec_of
    from pkt.models.rotary import rows_apart as rows_apart
    from pkt.models.spec import ModelSpec as ModelSpec
    from pkt.models.spec import Target as Target
    from pkt.models.spec import check_identity as check_identity
    from pkt.models.spec import content_kind as content_kind
    from pkt.models.spec import decoder_layers as decoder_layers
    from pkt.models.spec import described as described
    from pkt.models.spec import hidden_size as hidden_size
    from pkt.models.spec import is_tied as is_tied
    from pkt.models.spec import kind_of as kind_of
    from pkt.models.spec import layer_of as layer_of
    from pkt.models.spec import plain_head as plain_head
    from pkt.models.spec import spec_of_model as spec_of_model
    from pkt.models.spec import tables_of as tables_of
    from pkt.models.spec import with_roles as with_roles
    from pkt.models.vocabulary import other_ids as other_ids
    from pkt.models.vocabulary import shared_vocabulary as shared_vocabulary
    from pkt.models.vocabulary import vocabulary_digest as vocabulary_digest
else:  # a checker of types shall still refuse a name that is nowhere

    def __getattr__(name: str) -> Any:
        if not name.startswith("_"):
            for module in ("checkpoint", "huggingface", "positions", "reference", "rotary", "spec", "vocabulary"):
                found = vars(importlib.import_module(f"pkt.models.{module}"))
                if name in found:
                    return globals().setdefault(name, found[name])
        raise AttributeError(f"module 'pkt.models' has no attribute {name!r}")
