"""A YAML file as plain values, each with its line: what YAML's loaders silently turn into something else is refused, or as meant.

Scalars are YAML 1.2's: `3e-4` is a number, `on` and `no` are words. A doubled key, a merge key and a file of a hundred thousand
values by way of its anchors are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt.errors import PktError
from pkt.files import os_errors

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_MOST = 100_000


@dataclass(frozen=True)
class Placed:
    """A value and the line it stands on: a str, int, float, bool or None, a list of these, or a dict of them by name."""

    value: Any
    line: int

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {name: entry.plain() for name, entry in self.value.items()}
        return [entry.plain() for entry in self.value] if isinstance(self.value, list) else self.value


def read_yaml(file: Path) -> Placed:
    """The mapping that a YAML file holds. Raises `PktError`, with the line, for anything else."""
    if not file.is_file():
        raise PktError(f"{file} does not exist; name a study's YAML file, or a preset: pkt study --help lists them")
    with os_errors(f"reading {file}"):
        data = file.read_bytes()
    try:
        return parse_yaml(data.decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise PktError(f"{file}: not UTF-8 text; save the file as UTF-8") from error


def parse_yaml(text: str, source: str) -> Placed:
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise PktError(f"{source}{line}: not YAML ({getattr(error, 'problem', None) or 'cannot be read'})") from error
    except RecursionError:
        raise PktError(f"{source}: nested too deeply for a study") from None
    if not isinstance(node, yaml.MappingNode):
        raise PktError(f"{source}: a study is a mapping (student:, teachers:, tasks:, starts: ...)")
    return _Reader(source).read(node)


class _Reader:
    def __init__(self, source: str) -> None:
        self.source, self.count = source, 0
        self.inside: set[int] = set()

    def read(self, node: Any) -> Placed:
        import yaml

        line = node.start_mark.line + 1
        self.count += 1
        if self.count > _MOST or id(node) in self.inside:
            raise PktError(
                f"{self.source}:{line}: more than {_MOST} values, or an anchor inside itself; write them out"
            )
        if isinstance(node, yaml.ScalarNode):
            return Placed(self._scalar(node), line)
        self.inside.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            found = Placed([self.read(child) for child in node.value], line)
        else:
            found = Placed(self._mapping(node), line)
        self.inside.remove(id(node))
        return found

    def _mapping(self, node: Any) -> dict[str, Placed]:
        found: dict[str, Placed] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, key.value
            if not isinstance(name, str) or not name.isprintable():
                raise PktError(f"{self.source}:{line}: a key must be a word")
            if name == "<<":
                raise PktError(
                    f"{self.source}:{line}: merge keys (<<) are not read; write the values out, or use like:"
                )
            if name in found:
                raise PktError(f"{self.source}:{line}: {name} stands twice, first in line {found[name].line}; keep one")
            found[name] = self.read(value)
        return found

    def _scalar(self, node: Any) -> Any:
        text = node.value
        if node.style is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            if len(text) > 30:
                raise PktError(f"{self.source}:{node.start_mark.line + 1}: {text[:20]}... is no number a study can use")
            return int(text)
        return float(text) if _FLOAT.fullmatch(text) else text
