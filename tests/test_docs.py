"""The tutorial's commands, run in order in an empty folder; and figures that come from files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param("lineage.md", marks=pytest.mark.slow),
        "tutorial.md",
        pytest.param("distil.md", marks=pytest.mark.slow),
        pytest.param("serving.md", marks=pytest.mark.slow),
        pytest.param("study.md", marks=pytest.mark.slow),
    ],
)
def test_the_pages_commands_run(page: str, tmp_path: Path) -> None:
    script = ["set -euo pipefail", f'export PATH="{Path(sys.executable).parent}:$PATH"', "export HF_HUB_OFFLINE=1"]
    found = blocks(ROOT / "docs" / page)
    assert len(found) > 2
    for language, text in found:
        script.append(text if language == "bash" else f"python - <<'END'\n{text}END")
    done = processes.run(["bash", "-c", "\n".join(script)], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path: Path) -> None:
    """As they stand there, in a folder where the demo's models and rows have the names that stand for the reader's own."""
    assets = ROOT / "pkt" / "demo" / "assets"
    for name, source in {"TEACHER": "teacher", "STUDENT": "descendant", "BASE": "base"}.items():
        (tmp_path / name).symlink_to(assets / source)
    for name, source in {"SEEDS": "seeds", "DATA": "train", "TEST": "test"}.items():
        rows = (assets / "data" / f"{source}.jsonl").read_text().splitlines(keepends=True)[:16]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    (_, commands), _, (language, code) = blocks(ROOT / "README.md")
    lines = commands.splitlines()
    assert lines[0].startswith("pip install")
    assert language == "python"
    prelude = """import pkt
from transformers import AutoModelForCausalLM, AutoTokenizer
teacher, student = (AutoModelForCausalLM.from_pretrained(name) for name in ("TEACHER", "STUDENT"))
loader = pkt.load_seeds("SEEDS.jsonl", AutoTokenizer.from_pretrained("TEACHER"))
"""
    script = ["set -euo pipefail", f'export PATH="{Path(sys.executable).parent}:$PATH"', *lines[1:]]
    script.append(f"python - <<'END'\n{prelude}{code}END")
    done = processes.run(["bash", "-c", "\n".join(script)], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for adapter in ("ADAPTER", "adapter"):
        assert (tmp_path / adapter / "adapter_model.safetensors").is_file()


def test_every_command_in_the_pages_is_one_with_the_flags_that_it_has() -> None:
    from typer.main import get_command

    from pkt.cli import app

    known = {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        code = (
            "\n".join(block for language, block in blocks(page) if language == "bash").replace("\\\n", " ").splitlines()
        )
        code += [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^    (.*)$", text, re.M)]
        commands = [line for line in code if re.match(r"pkt [a-z]", line)]
        for line in commands:
            name, *words = line.split("#")[0].split()[1:]
            assert name in known, f"{page.name}: {line}"
            flags = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
            assert flags <= known[name] | {"--help", "--version"}, f"{page.name}: {line}"


def test_links_in_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_cited_sections_exist() -> None:
    sources = [p for folder in ("pkt", "kernels", "csrc", "tests", "bench") for p in (ROOT / folder).rglob("*.*")]
    cited: set[tuple[str, str]] = set()
    for source in (
        p for p in sources if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".md") and "assets" not in p.parts
    ):
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"\b(METHOD|DESIGN)[,\s]+(section|§)", text), (
            f"{source}: cites a page that is not in docs/"
        )
        for page, numbers in re.findall(r"docs/(\w+\.md)((?:,? §\d+)+)", text):
            cited |= {(page, number) for number in re.findall(r"\d+", numbers)}
    assert {page for page, _ in cited} == {"method.md", "design.md"}
    for page, number in sorted(cited):
        headings = re.findall(r"^## (\d+)\.", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
        assert number in headings, f"docs/{page} has no section {number}"


def test_names_of_modules_are_known_in_one_file_only() -> None:
    import ast

    from pkt.models import FUSED, PEFT_EMBEDDINGS, ROLES

    names = {*ROLES, *FUSED, *PEFT_EMBEDDINGS} - {"qkv", "gate_up"}
    known = re.compile(r"\b(" + "|".join(sorted(re.escape(n) for n in names)) + r")\b")
    for file in sorted((ROOT / "pkt").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            # A name has no spaces; prose may speak of them.
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                assert file.parent.name == "models" or not known.search(node.value), (
                    f"{file.name}:{node.lineno}: {node.value}"
                )


def test_the_readmes_tables_come_from_committed_results() -> None:
    for script in ("readme_tables.py", "readme_picture.py"):
        done = processes.run([sys.executable, ROOT / "bench" / script, "--check"])
        assert done.returncode == 0, done.stdout + done.stderr
