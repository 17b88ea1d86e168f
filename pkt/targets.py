"""A teacher's next-token distributions for the answer tokens of rows: what `pkt teach` writes and `pkt train` learns from.

One folder: `targets.safetensors` and pkt.json. Of each answer token either the counts of N draws, or the K likeliest tokens and
the mass of all others. A count and its token id are one word, id · N + count − 1, in as few bytes as the vocabulary and N take:
three for 64 draws from 128k tokens (at most 193 bytes a token, since no more than 64 ids can differ), two from 1024.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.files import MANIFEST, atomic_folder, safetensors_header, share_files, write_json
from pkt.manifest import manifest_of, read_manifest
from pkt.seeds import Example, Seeds

FILE = "targets.safetensors"
DIGEST = 16  # bytes of a row's hash
# How far probabilities stored in fp32 may be from 1.
SUMS_TO_ONE = 1e-3
_NAMES = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.float32: "F32"}


@dataclass(frozen=True)
class RowTargets:
    """Of each answer token of a row: ids [A, m], their shares of the draws or their probabilities [A, m], 0 where fewer than m
    are there; and the mass of all other tokens [A], where it is known."""

    ids: Tensor
    weights: Tensor
    rest: Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """form: "draws" or "top"; size: N or K. tensors, as they are stored:

    rows [R, 16]: a hash of each row's token ids and labels; answers [R]: its answer tokens. Of draws: distinct [T], how many ids
    each answer token has, and words [sum of distinct, bytes of a word]. Of top: ids and probabilities [T, K], rest [T].
    """

    form: str
    size: int
    vocabulary: int
    tokenizer: str
    tensors: dict[str, Tensor]
    told: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def __len__(self) -> int:
        return len(self.tensors["rows"])

    def __repr__(self) -> str:
        what = f"{self.size} draws" if self.form == "draws" else f"the {self.size} likeliest tokens and the rest's mass"
        return f"Targets({what} for {self.tokens} answer tokens of {len(self)} rows, {self.bytes_a_token:.0f} bytes a token)"

    @property
    def tokens(self) -> int:
        return int(self.tensors["answers"].sum())

    @property
    def bytes_a_token(self) -> float:
        return sum(t.numel() * t.element_size() for t in self.tensors.values()) / max(1, self.tokens)

    @property
    def top_id(self) -> int:
        """The largest token id that has any mass."""
        if self.form == "top":
            return int(self.tensors["ids"].max())
        return int(unpacked(self.tensors["words"], self.size)[0].max())

    @cached_property
    def _starts(self) -> Tensor:
        answers = self.tensors["answers"].long()
        return torch.cat([answers.new_zeros(1), answers.cumsum(0)])

    @cached_property
    def _first_word(self) -> Tensor:
        distinct = self.tensors["distinct"].long()
        return torch.cat([distinct.new_zeros(1), distinct.cumsum(0)])

    def row(self, index: int) -> RowTargets:
        first, stop = (int(self._starts[i]) for i in (index, index + 1))
        if self.form == "top":
            ids, weights, rest = (self.tensors[name][first:stop] for name in ("ids", "probabilities", "rest"))
            return RowTargets(ids.long(), weights, rest)
        ids, counts = unpacked(
            self.tensors["words"][int(self._first_word[first]) : int(self._first_word[stop])], self.size
        )
        distinct = self.tensors["distinct"][first:stop].long()
        there = torch.arange(int(distinct.max()))[None] < distinct[:, None]
        wide, weights = torch.zeros(there.shape, dtype=torch.int64), torch.zeros(there.shape)
        wide[there], weights[there] = ids, counts.float() / self.size
        return RowTargets(wide, weights)

    def places(self, rows: Seeds) -> list[int]:
        """Which row of the targets each row is. Raises `PktError` naming the first that is none of them."""
        left: dict[bytes, list[int]] = {}
        for index, digest in enumerate(self.tensors["rows"].numpy()):
            left.setdefault(digest.tobytes(), []).append(index)
        found, missing = [], []
        for number, example in enumerate(rows):
            mine = left.get(row_digest(example))
            if mine is None:
                missing.append(number)
                continue
            # Rows alike take their targets in order, and the last of them again when there are more.
            found.append(mine.pop(0) if len(mine) > 1 else mine[0])
        if len(missing) == len(rows):
            raise PktError(
                f"{self.source or 'the targets'} are of other rows than {rows.source}, or of the same read otherwise (--loss, "
                "--template, --max-length, another chat template); make them from these: pkt teach"
            )
        if missing:
            raise PktError(
                f"{rows.where(missing[0])}: the row changed since {self.source or 'the targets'} were made "
                f"({len(missing)} of {len(rows)} rows did); make them again: pkt teach"
            )
        return found

    @classmethod
    def load(cls, folder: str | Path) -> Targets:
        """Read and check a folder that `pkt teach` wrote. Raises `PktError` for damage and for masses that do not sum."""
        from safetensors.torch import load_file

        folder, manifest = Path(folder), read_manifest(folder)
        if manifest.get("kind") != "targets":
            raise PktError(f"{folder} holds no teacher's targets; name a folder that pkt teach wrote")
        file = folder / FILE
        safetensors_header(file)
        if file_digest(file) != manifest["sha256"]:
            raise PktError(f"{file} is damaged or not the file that {MANIFEST} describes; make it again: pkt teach")
        fields = {name: manifest[name] for name in ("form", "size", "vocabulary", "tokenizer")}
        found = cls(**fields, tensors=load_file(str(file)), told=manifest, source=str(folder))
        found.check()
        return found

    def check(self) -> None:
        """Raises `PktError` where the tensors do not belong together or an answer token's masses do not sum to one."""
        where, tensors = self.source or "the targets", self.tensors
        names = {"draws": {"distinct", "words"}, "top": {"ids", "probabilities", "rest"}}.get(self.form, set())
        if set(tensors) != {"rows", "answers"} | names or len(tensors["rows"]) != len(tensors["answers"]):
            raise PktError(f"{where}: not a teacher's targets of the form {self.form!r}; make them again: pkt teach")
        if self.form == "draws":
            ids, counts = unpacked(tensors["words"], self.size)
            lengths = len(tensors["distinct"]), len(ids)
            if lengths == (self.tokens, int(tensors["distinct"].sum())):
                upto = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[self._first_word]
                off = (upto.diff() != self.size).nonzero()
            else:
                off = torch.zeros(1, 1, dtype=torch.int64)
        else:
            ids, shares, rest = tensors["ids"], tensors["probabilities"], tensors["rest"]
            sums = shares.double().sum(1) + rest.double()
            bad = ((sums - 1).abs() > SUMS_TO_ONE) | (shares < 0).any(1) | (rest < 0) | ~sums.isfinite()
            off = bad.nonzero() if len(rest) == self.tokens else torch.zeros(1, 1, dtype=torch.int64)
        if len(off):
            raise PktError(
                f"{where}: the probabilities of answer token {int(off[0, 0])} do not sum to one; make them again: pkt teach"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise PktError(f"{where}: token ids beyond the vocabulary of {self.vocabulary}; make them again: pkt teach")


def row_digest(example: Example) -> bytes:
    """What tells a row from another: its token ids and which of them count."""
    return hashlib.sha256(json.dumps([example.input_ids, example.labels]).encode()).digest()[:DIGEST]


def word_bytes(vocabulary: int, draws: int) -> int:
    """Bytes that id · draws + count − 1 takes."""
    return max(1, ((vocabulary * draws - 1).bit_length() + 7) // 8)


def packed(ids: Tensor, counts: Tensor, draws: int, width: int) -> Tensor:
    """Words of ids and counts [n], as bytes [n, width], the lowest first."""
    words = ids * draws + counts - 1
    return (words[:, None] >> (8 * torch.arange(width))).bitwise_and_(255).to(torch.uint8)


def unpacked(words: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """(ids, counts) of words, int64."""
    values = (words.long() << (8 * torch.arange(words.shape[1]))).sum(1)
    return values // draws, values % draws + 1


def file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_targets(
    out: str | Path, parts: Sequence[Mapping[str, Tensor]], entries: Mapping[str, Any], *, force: bool = False
) -> None:
    """The folder of targets whose tensors come in parts along their first axis, never all in memory if `parts` reads them.

    entries: form, size, vocabulary, tokenizer and what else is told. The folder appears whole or not at all.
    """
    with atomic_folder(out, force=force) as made:
        _write_joined(made / FILE, parts)
        share_files(made)
        write_json(made / MANIFEST, manifest_of("targets", {**entries, "sha256": file_digest(made / FILE)}))


def _write_joined(file: Path, parts: Sequence[Mapping[str, Tensor]]) -> None:
    """safetensors of the parts' tensors, joined along their first axis."""
    sizes: dict[str, list[Any]] = {}
    for part in parts:
        for name, tensor in part.items():
            rows, _, _ = sizes.setdefault(name, [0, list(tensor.shape[1:]), tensor.dtype])
            sizes[name][0] = rows + tensor.shape[0]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wider types first, so that every tensor is aligned.
    names = sorted(sizes, key=lambda name: (-sizes[name][2].itemsize, name))
    for name in names:
        rows, shape, dtype = sizes[name]
        size = dtype.itemsize * rows * (torch.Size(shape).numel() if shape else 1)
        header[name] = {"dtype": _NAMES[dtype], "shape": [rows, *shape], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as into:
        into.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for part in parts:
                into.write(part[name].contiguous().numpy().data)
