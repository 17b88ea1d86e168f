"""A model on the Hub as a folder here: its snapshot in the Hub's own cache, downloaded where HF_HUB_OFFLINE allows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pkt.errors import PktError
from pkt.files import read_json
from pkt.models.checkpoint import first_line

FORMS = ("model.safetensors", "pytorch_model.bin")
# Everything of a checkpoint but its weights.
SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


def snapshot(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a model's files that match, of one revision (default: the main branch's newest).

    The folder's name is the revision's hash. Raises `PktError` for a model that is neither in the cache nor to be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # requests, the cache and the Hub raise many types
        raise PktError(
            f"{name}: there is no such folder here, and the Hub does not give it either: {first_line(error)}"
        ) from error


def fetch_weights(name: str, folder: Path) -> None:
    """Download into a snapshot, of the same revision, the weight files that transformers would load: the first form there is."""
    for form in FORMS:
        index = folder / f"{form}.index.json"
        wanted = [form]
        if index.is_file():
            value = read_json(index)
            shards = value.get("weight_map") if isinstance(value, dict) else None
            wanted += sorted({str(s) for s in shards.values()}) if isinstance(shards, dict) else []
        snapshot(name, wanted, folder.name)
        if index.is_file() or (folder / form).is_file():
            return
