"""What is published: wheels that work where they are put, a page, a site and a citation that say what is true."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import processes
import pytest
import yaml

import pkt

ROOT = Path(__file__).parents[1]

SMOKE = """
import sys, torch, pkt
from pkt import ops
assert pkt.__file__.startswith(sys.argv[1]), pkt.__file__
assert ops.implementation("rsvd", "cpu")[0] == "torch", ops.implementation("rsvd", "cpu")
torch.manual_seed(0)
W = torch.randn(96, 4) @ torch.randn(4, 64)
found = pkt.factorize(W, rank=4)
assert torch.allclose(found.B @ found.A, W, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("build") is None or find_spec("twine") is None, reason="needs build and twine (make test-slow)"
)
def test_a_release_builds_and_its_pure_wheel_works_without_a_compiler(tmp_path: Path) -> None:
    copy = tmp_path / "sources"
    assert processes.run(["git", "clone", "-q", ROOT, copy]).returncode == 0
    dist = tmp_path / "dist"
    # No isolation: what is built with is what is installed here, and nothing is fetched.
    done = processes.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, copy],
        env={**os.environ, "PKT_BUILD_EXT": "0"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    files = sorted(dist.iterdir())
    assert [re.sub(r"\d[\d.]*\d", "V", f.name) for f in files] == [
        "pkt_transfer-V-py3-none-any.whl",
        "pkt_transfer-V.tar.gz",
    ]
    done = processes.run([sys.executable, "-m", "twine", "check", "--strict", *files])
    assert done.returncode == 0, done.stdout + done.stderr
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", installed, files[0]]
    assert processes.run(pip).returncode == 0
    # An editable install beside it would lend it the compiled part.
    alone = (
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    (installed / "sitecustomize.py").write_text(alone)
    there = {**os.environ, "PYTHONPATH": str(installed)}
    done = processes.run([sys.executable, "-c", SMOKE, str(installed)], cwd=empty, env=there)
    assert done.returncode == 0, done.stderr
    assets = installed / "pkt" / "demo" / "assets"
    run = [
        sys.executable,
        "-m",
        "pkt",
        "transfer",
        assets / "teacher",
        assets / "student",
        assets / "data" / "seeds.jsonl",
    ]
    done = processes.run([*run, "--out", "extraction", "--dtype", "float32"], cwd=empty, env=there)
    assert done.returncode == 0, done.stderr
    assert (empty / "extraction" / "adapter_model.safetensors").is_file()


def test_the_citation_and_the_workflow_say_what_is_true() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pkt.__version__
    assert {"cff-version", "message", "title", "authors", "preferred-citation"} <= set(citation)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.M)[1] == pkt.__version__  # type: ignore[index]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs (make test-slow)")
def test_the_site_builds_and_its_links_lead_somewhere_without_a_network(tmp_path: Path) -> None:
    site = tmp_path / "site"
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = processes.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", site], cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert len(pages) > 15
    for page, text in pages.items():
        # What a browser would fetch by itself: scripts, styles, fonts, pictures.
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\"\s>]+)|<link[^>]*\shref=\"?([^\"\s>]+)", text)
        assert not [a or b for a, b in fetched if re.match(r"(https?:)?//", a or b)], page.name
        for link in re.findall(r"<a[^>]*\shref=\"?([^\"\s>]+)", text):
            target, anchor = urldefrag(unquote(link))
            if page.name == "404.html" or re.match(r"(https?|mailto):", target):
                continue
            other = (page.parent / target).resolve() if target else page
            assert other.is_file(), f"{page.name}: {link}"
            if anchor and other in pages:
                assert re.search(rf"\s(?:id|name)=\"?{re.escape(anchor)}[\"\s>]", pages[other]), f"{page.name}: {link}"
    reference = pages[site / "api.html"]
    assert not [name for name in pkt.__all__ if f"pkt.{name}" not in reference]
