"""Plain text to heal a model on: what it writes itself, and prose that lies on the machine."""

from __future__ import annotations

import gzip
import html
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

# Prose that Debian packages: debian-handbook, python3-doc, dict-gcide (apt-get install).
PROSE = (
    "/usr/share/doc/debian-handbook/html/en-US",
    "/usr/share/doc/python3.11/html/_sources",
    "/usr/share/doc/python3.13/html/_sources",
    "/usr/share/dictd/gcide.dict.dz",
)
_FILES = (".html", ".md", ".txt", ".rst", ".dz", ".gz")
_ASKED = ("Tell me about {}.", "Explain {} to a child.", "Write a short story about {}.", "What should everybody know of {}?",
          "Give me three facts about {}.", "Write a letter to a friend about {}.")  # fmt: skip
_TOPICS = (
    "rivers, bread, the moon, bridges, winter, honey, trains, mathematics, gardens, the sea, friendship, fire, clocks, "
    "mountains, paper, music, horses, glass, sleep, markets, light, salt, rain, teachers, ships, wool, stars, cooking, "
    "history, islands, money, letters, engines, trees, health, maps, birds, painting, stone, games, dreams, farming, "
    "windows, language, coffee, the heart, law, deserts, kings, silk, numbers"
)


def chunks(paths: Sequence[str | Path], tokenizer: Any, size: int) -> list[str]:
    """Pieces of about `size` tokens of the files that exist, whole paragraphs, in a random order that is always the same."""
    found = []
    for file in sorted(_named(paths)):
        piece: list[str] = []
        length = 0
        for paragraph in re.split(r"\n\s*\n", _read(file)):
            tidy = re.sub(r"[ \t]+", " ", paragraph).strip()
            if len(tidy) < 20:
                continue
            piece.append(tidy)
            length += len(tidy) // 4  # about a token
            if length >= size:
                found.append("\n\n".join(piece)[: 6 * size])
                piece, length = [], 0
    random.Random(0).shuffle(found)
    return found


def _named(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        yield from (f for f in path.rglob("*") if f.suffix in _FILES) if path.is_dir() else [path] * path.is_file()


def _read(file: Path) -> str:
    if file.suffix in (".dz", ".gz"):
        return gzip.open(file, "rt", errors="replace").read()
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".html":
        text = re.sub(r"(?s)<(script|style|head|nav).*?</\1>", " ", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</(p|div|h\d|li|pre)>", "\n\n", text)))
    return text


@torch.no_grad()
def written(model: Any, tokenizer: Any, count: int, length: int, batch: int = 64) -> list[str]:
    """What an instruct model answers when it is asked about this and that, drawn at temperature 1; of any other, what it writes."""
    made: list[str] = []
    generator = random.Random(1)
    torch.manual_seed(1)
    device = next(model.parameters()).device
    while len(made) < count:
        asked = [
            generator.choice(_ASKED).format(generator.choice(_TOPICS.split(", ")))
            for _ in range(min(batch, count - len(made)))
        ]
        if tokenizer.chat_template:
            prompts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in asked
            ]
        else:
            prompts = ["\n"] * len(asked)
        given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
            device
        )
        out = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], do_sample=True, top_k=0,
            max_new_tokens=length, pad_token_id=tokenizer.pad_token_id or 0,
        )  # fmt: skip
        answers = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        made += [f"{question}\n\n{answer.strip()}" for question, answer in zip(asked, answers, strict=True)]
    return made


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8", newline="\n")
    return path
