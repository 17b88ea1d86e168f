"""The commands as a user types them: the whole path, --json, exit codes, and how they end."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import zoo
from commands import PKT, fails, run
from conftest import ASSETS, save
from safetensors.torch import load_file

import pkt
from pkt.files import MANIFEST, safetensors_header


def test_the_whole_path(teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path) -> None:
    hashes = {p: p.read_bytes() for p in student_dir.iterdir()}
    text = run("transfer", teacher_dir, student_dir, seed_file, "--out", tmp_path / "ext", "--rank", 4)
    assert "model.layers.1.mlp.up_proj" in text
    assert "pkt train" in text
    text = run(
        *("train", student_dir, tmp_path / "ext", ASSETS / "data" / "train.jsonl", "--out", tmp_path / "run"),
        *("--max-steps", 4, "--batch-size", 4, "--micro-batch", 2, "--save-steps", 2, "--lr", 1e-2),
    )
    assert "pkt finalize" in text
    assert list((tmp_path / "run" / "logs").rglob("events*"))
    for source, out in ((tmp_path / "run", "a"), (tmp_path / "run" / "checkpoint-4", "b")):
        run("finalize", source, "--out", tmp_path / out)
    one, two = (load_file(tmp_path / out / "adapter_model.safetensors") for out in "ab")
    assert set(one) == set(two)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any("base_layer" in k for k in one)
    before, after = (
        json.loads(run("evaluate", student_dir, ASSETS / "data" / "test.jsonl", "--limit", 8, "--json", *extra))["nll"]
        for extra in ((), ("--adapter", tmp_path / "a"))
    )
    assert after < before
    for folder, word in (("ext", "extraction"), ("run", "training run"), ("a", "plain LoRA")):
        assert word in run("inspect", tmp_path / folder, "--student", student_dir)
    assert run("report", tmp_path / "ext").strip() == str(tmp_path / "ext" / "report.html")
    html = (tmp_path / "ext" / "report.html").read_text()
    assert "data:image/png;base64," in html
    assert "lm_head" in html
    assert hashes == {p: p.read_bytes() for p in student_dir.iterdir()}


def test_step_by_step_equals_transfer(
    teacher_dir: Path, student_dir: Path, seed_file: Path, extraction_dir: Path, tmp_path: Path
) -> None:
    run("sensitivity", teacher_dir, seed_file, "--out", tmp_path / "s.safetensors")
    plan = json.loads(
        run("plan", tmp_path / "s.safetensors", teacher_dir, student_dir, "--out", tmp_path / "plan.json", "--json")
    )
    assert plan == json.loads((tmp_path / "plan.json").read_text())
    run("extract", teacher_dir, tmp_path / "plan.json", "--rank", 4, "--out", tmp_path / "ext")
    one, two = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "ext", extraction_dir))
    assert all(torch.allclose(one[k], two[k], atol=1e-6) for k in two)


def test_models_of_other_kinds(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = {row["what"]: row for row in json.loads(run("models", "--json"))}
    assert rows["safetensors"]["here"] == rows["llama"]["here"] == "yes"
    assert rows["other quantizations"]["here"] == "no"
    found = {row["matrix"]: row["role"] for row in json.loads(run("models", teacher_dir, "--json"))}
    assert found["model.layers.*.self_attn.q_proj"] == "q"
    assert "4 decoder layers at model.layers" in run("models", teacher_dir)

    command = ("transfer", teacher_dir, student_dir, seed_file, "--rank", 4, "--out", tmp_path / "ext")
    pair = "model.layers.*.mlp.gate_proj=model.layers.*.mlp.up_proj"
    text = run(*command, "--map", pair, "--map", "lm_head=lm_head")
    assert re.search(r"model\.layers\.\d\.mlp\.gate_proj +model\.layers\.1\.mlp\.up_proj", text)
    assert set(pkt.Extraction.load(tmp_path / "ext").pairs) == {
        *(f"model.layers.{i}.mlp.up_proj" for i in (0, 1)),
        "lm_head",
    }
    assert "module_map changed" in fails(*command, "--map", pair)

    deep = save(zoo.llama(hidden=56, layers=5, vocab=len(tokenizer)), tmp_path / "deep", tokenizer)
    assert "--partial" in fails("transfer", teacher_dir, deep, seed_file, "--out", tmp_path / "part")
    text = run("transfer", teacher_dir, deep, seed_file, "--out", tmp_path / "part", "--partial", "--rank", 4)
    assert "first 4 of 5 layers" in text
    assert "of the student's chosen weights are fed" in text
    text = run(
        "transfer", teacher_dir, student_dir, seed_file, "--out", tmp_path / "v", "--map-vocabulary", "--rank", 4
    )
    assert f"mapped by {len(tokenizer)} shared tokens" in text
    (tmp_path / "roles.json").write_text('{"gate_proj": ["up", "ffn"]}')
    run(*command[:-1], tmp_path / "r", "--roles", tmp_path / "roles.json", "--modules", "up")
    assert set(pkt.Extraction.load(tmp_path / "r").pairs) == {
        f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj")
    }
    (tmp_path / "roles.json").write_text("[]")
    assert "a role file is a JSON object" in fails(*command[:-1], tmp_path / "s", "--roles", tmp_path / "roles.json")


def test_transfer_is_deterministic_resumes_and_refuses_other_options(
    teacher_dir: Path, student_dir: Path, seed_file: Path, extraction_dir: Path, tmp_path: Path
) -> None:
    command = ("transfer", teacher_dir, student_dir, seed_file, "--out", tmp_path / "ext", "--json")
    # One line per layer goes to stderr, the result to stdout; the test runner shows both.
    first = json.loads(run(*command, "--rank", 4).splitlines()[-1])
    assert first["pairs"] == 16
    weights = (tmp_path / "ext" / "adapter_model.safetensors").read_bytes()
    assert weights == (extraction_dir / "adapter_model.safetensors").read_bytes()
    stamp = (tmp_path / "ext" / MANIFEST).stat().st_mtime_ns
    assert json.loads(run(*command, "--rank", 4).splitlines()[-1]) == first
    assert (tmp_path / "ext" / MANIFEST).stat().st_mtime_ns == stamp
    message = fails(*command, "--rank", 3)
    assert "another transfer" in message
    assert "rank: 4 there, 3 here" in message
    run(*command, "--rank", 3, "--force")
    assert json.loads((tmp_path / "ext" / "adapter_config.json").read_text())["r"] == 3


def test_inject_writes_a_folder_for_other_trainers(student_dir: Path, extraction_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from pkt.models import load_model

    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    reference = load_model(student_dir)(ids).logits
    for mode in ("paired", "residual"):
        out = tmp_path / mode
        run("inject", student_dir, extraction_dir, "--out", out, "--mode", mode)
        base = load_model(out / "base" if mode == "residual" else student_dir)
        logits = PeftModel.from_pretrained(base, str(out)).eval()(ids).logits
        torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
        run("finalize", out, "--out", tmp_path / f"{mode}-plain", "--student", student_dir)


def test_help_version_and_env() -> None:
    text = run("--help")
    for command in (
        "transfer",
        "sensitivity",
        "plan",
        "inject",
        "train",
        "finalize",
        "inspect",
        "report",
        "env",
        "demo",
    ):
        assert command in text
        assert run(command, "--help")
    assert pkt.__version__ in run("--version")
    found = json.loads(run("env", "--json"))
    assert {row["op"] for row in found["ops"]} >= {"pkt::linear_sensitivity_", "pkt::rsvd", "pkt::rsvd_batch"}
    assert "pkt::best_window" in run("env")


def test_errors_are_one_line_and_the_traceback_comes_with_debug(tmp_path: Path) -> None:
    for extra, traceback in ((), False), (("--debug",), True):
        done = processes.run([*PKT, *extra, "inspect", tmp_path / "no"])
        assert done.returncode == 1
        assert "is not a folder" in done.stderr
        assert ("Traceback" in done.stderr) == traceback
        assert done.stdout == ""
    assert processes.run([*PKT, "inspect"]).returncode == 2


def main_prints(monkeypatch: Any, capsys: Any, *args: Any) -> tuple[Any, str]:
    """The exit code of the entry point, and what it prints on stderr."""
    from pkt import cli

    monkeypatch.setattr(sys, "argv", ["pkt", *map(str, args)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as done:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return done.value.code, capsys.readouterr().err.replace("\n", " ").strip()


def test_ctrl_c_says_what_the_same_command_does(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    from pkt import lora, training, transferring

    monkeypatch.chdir(tmp_path)

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def terminate(*args: Any, **options: Any) -> None:
        raise SystemExit(143)

    for module, name in ((training, "train"), (transferring, "transfer"), (lora, "finalize")):
        monkeypatch.setattr(module, name, stop)
    three = ("a", "b", "c", "--out", "d")
    goes_on, nothing = "stopped; the same command continues", "stopped before anything was saved"
    for command in ("train", "transfer"):
        assert main_prints(monkeypatch, capsys, command, *three) == (130, nothing)
    (tmp_path / "d" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / ".d.run").mkdir()
    for command, words in (
        (("train", *three), goes_on),
        (("transfer", *three), goes_on),
        (("transfer", "a", "b", "c", "--out=d"), goes_on),
        (("train", *three, "--force"), f"{goes_on}, without --force"),
        (("finalize", "a", "--out", "d"), "stopped"),
    ):
        assert main_prints(monkeypatch, capsys, *command) == (130, words)
    monkeypatch.setattr(transferring, "transfer", terminate)
    assert main_prints(monkeypatch, capsys, "transfer", *three) == (143, goes_on)


def stopped_at(module: str, number: int, *words: Any) -> tuple[int, list[str]]:
    """The exit code of a command that gets a signal when the import of a module is done, and what it says on stderr itself."""
    command = [sys.executable, "-X", "importtime", "-m", "pkt", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                if not line.startswith("import time:"):
                    said.append(line.rstrip())
                elif line.rpartition("|")[2].strip() == module:
                    process.send_signal(number)
                    module = ""
            assert not module, "it was never imported"
            return process.wait(60), said
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("torch.nn.modules.linear", signal.SIGINT),
        ("pkt.files", signal.SIGTERM),
        *(
            pytest.param(module, number, marks=pytest.mark.slow)
            for module, number in [
                ("typer.core", signal.SIGINT),
                ("typer.core", signal.SIGTERM),
                ("torch._C", signal.SIGINT),
                ("torch._C", signal.SIGTERM),
                ("torch.nn.modules.linear", signal.SIGTERM),
                ("pkt.files", signal.SIGINT),
            ]
        ),
    ],
)
def test_a_signal_while_modules_are_imported_is_one_line(
    number: int, module: str, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    code, said = stopped_at(module, number, "transfer", teacher_dir, student_dir, seed_file, "--out", tmp_path / "o")
    assert code == 128 + number
    assert len(said) == 1
    assert said[0].startswith("stopped")
    assert not list(tmp_path.glob("*o*"))


def test_a_finished_and_an_unfinished_transfer_are_told(
    monkeypatch: Any, capsys: Any, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    from pkt.streaming import Engine

    out = tmp_path / "out"
    words = ("transfer", teacher_dir, student_dir, seed_file, "--rank", 4, "--out", out)
    plain = Engine._score_layer

    def stop(self: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return plain(self, index, *rest)

    monkeypatch.setattr(Engine, "_score_layer", stop)
    assert main_prints(monkeypatch, capsys, *words)[0] == 130
    monkeypatch.undo()
    # The head and layers 3 and 2 are finished.
    found = json.loads(run("inspect", out, "--json"))
    assert found["is"] == "an unfinished transfer: 3 of 6 parts are finished"
    assert "rank 4" in found["options"]
    assert "rank: 4 there, 2 here" in fails(*words[:5], 2, "--out", out)
    assert "already" not in run(*words)
    assert "the result of this command is there already" in " ".join(run(*words).split())


def test_an_unreadable_file_is_one_line(
    monkeypatch: Any, capsys: Any, student_dir: Path, extraction_dir: Path, tmp_path: Path
) -> None:
    import builtins

    plain = builtins.open

    def guarded(file: Any, *args: Any, **options: Any) -> Any:
        if Path(str(file)).name in ("pkt.json", "adapter_model.safetensors", "notes.txt"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return plain(file, *args, **options)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr("io.open", guarded)
    with pytest.raises(pkt.PktError, match=r"reading .*pkt\.json: Permission denied; check the permissions"):
        pkt.Extraction.load(extraction_dir)
    with pytest.raises(pkt.PktError, match=r"adapter_model\.safetensors: Permission denied; check the permissions"):
        safetensors_header(extraction_dir / "adapter_model.safetensors")
    # What no function expected reaches the user as one line, too.
    monkeypatch.setattr("pkt.reporting.inspect_folder", lambda *args: guarded("notes.txt"))
    code, text = main_prints(monkeypatch, capsys, "inspect", tmp_path)
    assert (code, text) == (1, "error: [Errno 13] Permission denied: 'notes.txt'")


def test_rows_that_are_cut_are_counted_once(
    monkeypatch: Any,
    capsys: Any,
    teacher_dir: Path,
    student_dir: Path,
    extraction_dir: Path,
    seed_file: Path,
    tmp_path: Path,
) -> None:
    lines = seed_file.read_text().splitlines()[:4]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    longest = max(len(e.input_ids) for e in pkt.load_seeds(tmp_path / "few.jsonl", student_dir))
    rows: Any = [tmp_path / "few.jsonl", "--max-length", longest - 1]
    said = r"few\.jsonl: [1-4] of 4 rows (is|are) longer than \d+ tokens and cut there"
    commands: list[list[Any]] = [
        ["evaluate", student_dir, *rows],
        ["train", student_dir, extraction_dir, *rows, "--out", tmp_path / "run", "--max-steps", 1],
        ["sensitivity", teacher_dir, *rows, "--out", tmp_path / "s.safetensors"],
        ["transfer", teacher_dir, student_dir, *rows, "--out", tmp_path / "e", "--rank", 2, "--modules", "q"],
    ]
    for command in commands:
        with pytest.warns(pkt.PktWarning, match=said) as found:
            run(*command)
        assert len([w for w in found if issubclass(w.category, pkt.PktWarning)]) == 1
    # On the command line it is one line, as an error is.
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default", pkt.PktWarning)
        code, text = main_prints(patch, capsys, *commands[0])
    assert code == 0
    assert re.fullmatch(rf"note: .*{said}; max_length \(--max-length\) sets where", text)


def test_what_to_type_next_can_be_typed(
    student_dir: Path, extraction_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from pkt import training, transferring

    student, ext = tmp_path / "my student", tmp_path / "an extraction"
    shutil.copytree(student_dir, student)
    made = pkt.Extraction.load(extraction_dir)
    made.plan.student["name"] = str(student)
    made.save(ext)
    expected = ["train", str(student), str(ext), "DATA.jsonl", "--out", "RUN"]
    assert shlex.split(json.loads(run("inspect", ext, "--json"))["next"])[1:] == expected
    card = re.search(r"`pkt (train .*?)`", (ext / "README.md").read_text())
    assert card is not None
    assert shlex.split(card[1]) == [*expected[:2], "DIR", *expected[3:]]
    monkeypatch.setattr(transferring, "transfer", lambda *args, **options: made)
    monkeypatch.setattr(training, "train", lambda *args, **options: None)
    for command, words in (
        (("transfer", "t", student, "seeds", "--out", ext), expected),
        (("train", student, ext, "data", "--out", tmp_path / "r [x]"), ["finalize", str(tmp_path / "r [x]")]),
    ):
        (line,) = [line for line in run(*command).splitlines() if line.startswith("next:")]
        assert shlex.split(line)[2:][: len(words)] == words


def test_import_is_light() -> None:
    code = "import sys, pkt; print([m for m in ('transformers', 'peft', 'triton', 'typer', 'matplotlib') if m in sys.modules])"
    done = processes.run([sys.executable, "-c", code])
    assert done.stdout.strip() == "[]", done.stderr
    for name in pkt.__all__:
        assert getattr(pkt, name) is getattr(pkt, name)
