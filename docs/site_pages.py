"""For mkdocs: pages that live elsewhere in the repository, links between all of them, and the list of public functions."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "kernels/README.md": "kernels.md",
    "csrc/README.md": "csrc.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Any, config: Any) -> Any:
    for source, name in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_moved(text, Path(source).parent)))
    files.append(File.generated(config, "api.md", content=_functions()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A page of docs/ may link to one that lives elsewhere."""
    return _moved(markdown, Path("docs")) if page.file.generated_by is None else markdown


def _moved(text: str, folder: Path) -> str:
    """Every relative link of a page that stood in `folder` of the repository, as the site has it; code stays as it is."""

    def link(found: re.Match[str]) -> str:
        target = (ROOT / folder / found[2]).resolve().relative_to(ROOT).as_posix()
        if target in ELSEWHERE:
            return f"[{found[1]}]({ELSEWHERE[target]}{found[3] or ''})"
        if target.startswith("docs/"):
            return f"[{found[1]}]({target.removeprefix('docs/')}{found[3] or ''})"
        return f"{found[1]} (`{target}`)"  # a file of the repository that is no page

    return re.sub(r"\[([^\]\n]+)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", link, text)


def _imports(package: str) -> dict[str, str]:
    """Where each name that a package imports is defined: one step."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    return {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in found for alias in node.names}


def _functions() -> str:
    """One entry for each public name of pkt, in the order of the alphabet, where it is defined."""
    entries = []
    for name, home in sorted(_imports("pkt").items()):
        module = home.rpartition(".")[0]
        if not (module.startswith("pkt.") and (name[0].isupper() or name.islower())):
            continue  # what pkt/__init__.py uses itself
        if (ROOT / module.replace(".", "/")).is_dir():
            home = _imports(module).get(name, home)
        entries.append(f"::: {home}\n    options: {{heading: pkt.{name}}}\n")
    return "# Python\n\nEverything here is `pkt.NAME`.\n\n" + "\n".join(entries)
