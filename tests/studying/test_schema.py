"""Studies that are read, and those that are refused in one line with file, line and the nearest key."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkt import PktError
from pkt.studying import open_study, preset_names
from pkt.studying.schema import PlainLora, Transfer, Transplant, read_study
from pkt.studying.yaml_files import parse_yaml

GOOD = """student: demo:student
teachers: {large: demo:teacher}
tasks:
  sums:
    seeds: demo:data/seeds.jsonl
    train: demo:data/train.jsonl
    rows: 32
    held_out: 16
    tests:
      problems: {data: demo:data/test.jsonl}
    decides: problems.nll
starts:
  pkt: {kind: transfer, teacher: large}
  random: {like: pkt, layers: random, select: random}
  lora: {kind: lora, extra_steps: 0.25}
panels:
  layers: {of: pkt, vary: layers, over: [first, last]}
rates: {lr: [3e-4, 1e-3], a_scale: [1, 3]}
compare: {of: pkt}
"""


def read(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return read_study(file)


def test_a_study_is_read_as_it_is_meant(tmp_path: Path) -> None:
    study = read(tmp_path, GOOD)
    assert study.rates.lr == (3e-4, 1e-3)
    assert study.rates.a_scale == (1.0, 3.0)
    pkt, random, lora = study.starts["pkt"], study.starts["random"], study.starts["lora"]
    assert isinstance(pkt, Transfer)
    assert Path(pkt.teacher).name == "teacher"
    assert not pkt.drawn
    assert isinstance(random, Transfer)
    assert random.teacher == pkt.teacher
    assert random.drawn
    assert lora == PlainLora(extra_steps=0.25)
    varied = study.varied()
    assert set(varied) == {"pkt", "random", "lora", "layers=first", "layers=last"}
    assert isinstance(varied["layers=last"], Transfer)
    assert varied["layers=last"].layers == "last"
    assert study.study == "study"
    assert study.training_seeds == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("held_out: 16", "hold_out: 16", r"study.yaml:8: tasks.sums.hold_out is unknown; did you mean held_out\?"),
        ("rows: 32", "rows: 32\n    rows: 64", "study.yaml:8: rows stands twice, first in line 7"),
        ("rows: 32", "rows: many", "study.yaml:7: tasks.sums.rows must be a whole number, not 'many'"),
        ("lr: [3e-4, 1e-3]", 'lr: ["3e-4", 1e-3]', r"study.yaml:18: rates.lr\[0\] must be a number, not '3e-4'"),
        ("lr: [3e-4, 1e-3]", "lr: [1e-3, 3e-4]", "study.yaml:18: rates.lr and rates.a_scale must grow"),
        ("lr: [3e-4, 1e-3]", "lr: [-1, 1e-3]", "study.yaml:18: rates.lr must be positive"),
        ("kind: lora", "kind: lola", "study.yaml:15: starts.lora is of the unknown kind 'lola'; kinds are lora, start"),
        ("like: pkt", "like: pktt", r"study.yaml:14: like: pktt is no other start; did you mean pkt\?"),
        ("like: pkt", "like: random", "study.yaml:14: like: random is no other start"),
        ("teacher: large", "teacher: huge", "study.yaml:13: teacher: huge is not among teachers; known are large"),
        (
            "decides: problems.nll",
            "decides: problems.bleu",
            r"study.yaml:5: tasks.sums.decides: problems.bleu is measured by no",
        ),
        ("of: pkt}\n", "of: pt}\n", r"study.yaml:19: pt is no start; did you mean pkt\?"),
        ("vary: layers", "vary: layer", r"study.yaml:17: vary: layer is no option; did you mean layers\?"),
        (
            "over: [first",
            "over: [fist",
            "panels.layers.over must be one of sensitivity, first, last, random, not 'fist'",
        ),
        ("demo:data/test.jsonl", "nowhere.jsonl", "nowhere.jsonl is not a file"),
        ("student: demo:student", "stdent: demo:student", r"study.yaml:1: stdent is unknown; did you mean student\?"),
        ("compare: {of: pkt}", "", "compare is missing"),
        ("compare: {of: pkt}", "compare: {of: pkt}\nseeds: [1, 1]", "study.yaml:20: seeds must be a count"),
        ("compare: {of: pkt}", "compare: {of: pkt}\nseeds: [1000]", "rates.seeds and seeds share a value"),
        ("student: demo:student", "<<: {student: x}", "merge keys"),
        ("student: demo:student", "student: [a", "not YAML"),
        ("student: demo:student", "student: ${student}", "needs --student"),
        ("layers: random, select: random", "seeds_of: next", "study.yaml:14: seeds_of: next needs another task"),
        (
            "extra_steps: 0.25",
            "extra_steps: costs",
            "study.yaml:15: starts.lora.extra_steps must be a number or one of cost",
        ),
        (
            "extra_steps: 0.25",
            "init: pisa",
            "study.yaml:15: starts.lora: init='pisa' is none of PEFT's initialisations",
        ),
    ],
)
def test_a_mistake_is_one_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(PktError, match=said) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_a_plain_lora_is_charged_for_what_the_start_costs(tmp_path: Path) -> None:
    """One is added where there is none, as a control; one that costs nothing needs none."""
    for there in ("  lora: {kind: lora}", "  eva: {kind: lora, init: eva}"):
        study = read(tmp_path, GOOD.replace("  lora: {kind: lora, extra_steps: 0.25}", there))
        assert study.starts["lora, charged"] == PlainLora(extra_steps="cost")
    text = GOOD.replace("lora: {kind: lora, extra_steps: 0.25}", "pissa: {kind: start, how: pissa}")
    study = read(tmp_path, text.replace("compare: {of: pkt}", "compare: {of: pkt, controls: [random]}"))
    assert study.compare.controls == ("random", "lora, charged")
    assert "lora, charged" not in read(tmp_path, GOOD).starts
    free = GOOD.replace("extra_steps: 0.25", "extra_steps: 0")
    free = free.replace("  pkt:", "  pissa: {kind: start, how: pissa}\n  pkt:")
    assert "lora, charged" not in read(tmp_path, free.replace("compare: {of: pkt}", "compare: {of: pissa}")).starts


def test_the_next_task_is_the_one_after_and_the_last_ones_is_the_first(tmp_path: Path) -> None:
    lines = GOOD.splitlines(keepends=True)
    task = "".join(lines[3:11])
    assert task.startswith("  sums:")
    text = GOOD.replace(task, task + task.replace("sums", "other"))
    study = read(tmp_path, text.replace("layers: random, select: random", "seeds_of: next"))
    assert [study.seeds_of(name, study.starts["random"]) for name in study.tasks] == ["other", "sums"]
    assert [study.seeds_of(name, study.starts["pkt"]) for name in study.tasks] == ["sums", "other"]


def test_scalars_are_yaml_1_2s() -> None:
    text = "a: 3e-4\nb: 1e4\nc: on\nd: no\ne: 010\nf: '1'\ng: true\nh: ~\ni: .5\nj: -3\nk: 1_000\n"
    assert parse_yaml(text, "x").plain() == {
        "a": 3e-4, "b": 1e4, "c": "on", "d": "no", "e": 10, "f": "1", "g": True, "h": None, "i": 0.5, "j": -3, "k": "1_000",
    }  # fmt: skip


def test_anchors_do_not_explode() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 9):
        bomb += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n"
    with pytest.raises(PktError, match="more than 100000 values"):
        parse_yaml(bomb, "bomb.yaml")
    with pytest.raises(PktError, match=r"loop.yaml:1: .*an anchor inside itself"):
        parse_yaml("a: &a [*a]\n", "loop.yaml")


lines = GOOD.splitlines()
words = st.sampled_from(
    [
        "student",
        "[",
        "}",
        "- ",
        "&a",
        "*a",
        ": ",
        "!!python/object:os.system",
        "3e-4",
        "~",
        "\t",
        "'",
        "{",
        "?",
        "|",
        "=",
        "0x1f",
        "2026-01-01",
    ]
)


def refused_in_one_line(file: Path) -> None:
    """Read, or refused by file and in one line; whatever else is raised is a fault."""
    said = str(file)
    with contextlib.suppress(PktError):
        try:
            read_study(file)
        except PktError as error:
            said = str(error)
            raise
    assert "\n" not in said
    assert said.startswith(str(file))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, len(lines) - 1),
    word=st.one_of(words, st.text(max_size=20)),
    how=st.sampled_from(["in", "over", "out", "twice"]),
)
def test_whatever_is_typed_is_read_or_refused(at: int, word: str, how: str, tmp_path: Path) -> None:
    changed = list(lines)
    changed[at] = {"in": changed[at] + word, "over": word, "out": "", "twice": f"{changed[at]}\n{changed[at]}"}[how]
    file = tmp_path / "study.yaml"
    file.write_text("\n".join(changed), encoding="utf-8", errors="surrogatepass")
    refused_in_one_line(file)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a tree stands, mappings and lists too."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in below for place in places(entry, (*path, key)))]


TREE = parse_yaml(GOOD, "good").plain()
PLACES = places(TREE)[1:]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["3e-4", "-1", "on", "${x}", "${x?}"]),
)
values = st.recursive(
    scalars,
    lambda each: st.one_of(st.lists(each, max_size=3), st.dictionaries(st.text(max_size=6), each, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=values, key=st.one_of(st.none(), st.text(min_size=1, max_size=8)))
def test_any_value_in_any_place_is_read_or_refused(place: Any, value: Any, key: str | None, tmp_path: Path) -> None:
    """A value of another type, or under another key, anywhere in a study."""
    import yaml

    tree = copy.deepcopy(TREE)
    at = tree
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    if key is not None and isinstance(at, dict):
        at[key] = at.pop(place[-1])
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8")
    refused_in_one_line(file)


def test_every_preset_is_read(tmp_path: Path) -> None:
    assert set(preset_names()) == {"demo", "paper", "paper-teachers", "quick"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    for task in ("gsm8k", "mmlu", "super_ni"):
        (tmp_path / task).mkdir()
        for name in ("seeds", "train", "held_out", "zero", "five", "eight", "test"):
            (tmp_path / task / f"{name}.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "general.jsonl").write_text('{"text": "one"}\n')
    filled = {name: str(rows) for name in ("seeds", "train", "test")} | {"student": "S", "teacher": "T"}
    filled["data"] = str(tmp_path)
    for name in preset_names():
        study = open_study(name, filled)
        assert study.compare.of in study.starts
    quick = open_study("quick", filled)
    assert isinstance(quick.starts["transplant"], Transplant)
    assert quick.starts["transplant"].base is None
    with pytest.raises(PktError, match="preset quick needs --student"):
        open_study("quick")
    with pytest.raises(PktError, match="nothing is no file and no preset; presets are demo"):
        open_study("nothing")
