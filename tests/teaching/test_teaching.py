"""`pkt teach`: distributions that are the teacher's, the same streamed, in memory and after any interruption; and its refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import empty_beside, fails, run
from conftest import ASSETS, write_rows
from oracle import seeds
from torch import Tensor

import pkt
from pkt.models import load_model
from pkt.seeds import IGNORE, Seeds, load_seeds
from pkt.streaming import parse_size, passes
from pkt.streaming.forward import Forward
from pkt.streaming.parts import LayeredModel
from pkt.targets import Targets
from pkt.teaching.drawing import drawn, uniforms

DATA = ASSETS / "data"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def truth(model: Any, rows: Seeds) -> list[Tensor]:
    """Of each row [A, V]: the model's own probabilities for its answer tokens."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1].double()
        found.append(logits.softmax(1)[torch.tensor(row.labels[1:]) != IGNORE])
    return found


def spread(targets: Targets, index: int, vocabulary: int) -> Tensor:
    """[A, V] of a row's targets."""
    row = targets.row(index)
    return torch.zeros(len(row.ids), vocabulary, dtype=torch.float64).scatter_add_(1, row.ids, row.weights.double())


def teach(model: Any, rows: Any, tokenizer: Any = None, **options: Any) -> Targets:
    return pkt.teach(model, rows, tokenizer=tokenizer, progress=False, **options)


# -- the draws


def test_the_mean_of_many_draws_is_the_distribution() -> None:
    torch.manual_seed(0)
    p = torch.softmax(3 * torch.randn(1, 50), 1)
    times, n = 4000, 8
    u = uniforms(0, b"row", 0, times, n)
    distinct, ids, counts = drawn(p.expand(times, -1), u)
    assert int(counts.sum()) == times * n
    assert torch.equal(torch.zeros(times).index_add_(0, torch.arange(times).repeat_interleave(distinct), counts.float()),
                       torch.full((times,), float(n)))  # fmt: skip
    mean = torch.zeros(50, dtype=torch.float64).index_add_(0, ids, counts.double()) / (times * n)
    # Five standard deviations of independent draws, which stratified ones do not exceed.
    assert bool(((mean - p[0]).abs() < 5 * (p[0] * (1 - p[0]) / (times * n)).sqrt() + 1e-6).all())


def test_a_count_is_never_two_from_its_share() -> None:
    torch.manual_seed(1)
    p = torch.softmax(2 * torch.randn(200, 40), 1)
    distinct, ids, counts = drawn(p, uniforms(3, b"row", 0, 200, 64))
    found = torch.zeros(200, 40).index_put_((torch.arange(200).repeat_interleave(distinct), ids), counts.float())
    assert float((found - 64 * p).abs().max()) < 2


def test_ids_without_mass_are_never_drawn() -> None:
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(500, -1)
    _, ids, _ = drawn(p, uniforms(0, b"x", 0, 500, 16))
    assert set(ids.tolist()) == {1, 3}


# -- against the model


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_familys_distributions_are_its_own(family: str, tokenizer: Any) -> None:
    model, rows = zoo.model(family), seeds(4)
    found = teach(model, rows, tokenizer, top=zoo.VOCAB, batch_size=3)
    for index, p in enumerate(truth(model, rows)):
        assert float((spread(found, index, zoo.VOCAB) - p).abs().max()) < 1e-5
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_draws_are_of_the_models_distributions_and_its_loss_is_told(tokenizer: Any) -> None:
    model, rows = zoo.llama(), seeds()
    found, want = teach(model, rows, tokenizer, draws=4096), truth(model, rows)
    for index, p in enumerate(want):
        assert float((spread(found, index, 67) - p).abs().max()) < 2 / 4096 + 1e-5
    ids = [torch.tensor([label for label in row.labels[1:] if label != IGNORE]) for row in rows]
    nll = [-p.gather(1, i[:, None]).log() for p, i in zip(want, ids, strict=True)]
    assert found.told["nll"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)


def test_top_keeps_the_likeliest_and_the_mass_of_the_rest(tokenizer: Any) -> None:
    model, rows = zoo.llama(), seeds(3)
    found = teach(model, rows, tokenizer, top=5)
    for index, p in enumerate(truth(model, rows)):
        row, best = found.row(index), p.topk(5)
        assert torch.equal(row.ids, best.indices)
        assert row.rest is not None
        assert float((row.weights - best.values).abs().max()) < 1e-6
        assert float((row.rest - (1 - best.values.sum(1))).abs().max()) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_streamed_and_in_memory_and_any_batch_are_the_same(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    model, rows = zoo.llama(tied, vocab=len(tokenizer)), seeds(9)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    whole = teach(model, rows, tokenizer)
    needed: list[Any] = []
    for options in ({}, {"batch_size": 2}, {"device_memory": "40MB"}):
        found = teach(tmp_path / "teacher", rows, on_memory=needed.append, **options)
        assert all(torch.equal(whole.tensors[name], found.tensors[name]) for name in whole.tensors)
    assert all(plan.device_total <= plan.device_limit for plan in needed)


def test_a_rows_draws_hang_on_no_other_row_and_on_the_seed(tokenizer: Any) -> None:
    model, rows = zoo.llama(), seeds(6)
    every = teach(model, rows, tokenizer)
    some = teach(model, Seeds([rows[4], rows[1], rows[1]], "some.jsonl", 3), tokenizer)
    for mine, theirs in ((0, 4), (1, 1)):
        assert torch.equal(some.row(mine).ids, every.row(theirs).ids)
        assert torch.equal(some.row(mine).weights, every.row(theirs).weights)
    # The same row again is drawn from again.
    assert not torch.equal(spread(some, 2, 67), spread(some, 1, 67))
    assert not torch.equal(spread(teach(model, rows, tokenizer, seed=1), 0, 67), spread(every, 0, 67))


def test_never_more_logits_than_a_block(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = zoo.llama(), seeds()
    whole = teach(model, rows, tokenizer)
    monkeypatch.setitem(passes.HEAD, "cpu", 5 * 67)
    monkeypatch.setitem(passes.DRAW, "cpu", 2 * 67)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[-2]))
    found = teach(model, rows, tokenizer)
    assert sorted(set(seen))[-1] <= 16  # the probe of the head
    assert seen.count(5) > 5
    assert all(torch.equal(whole.tensors[name], found.tensors[name]) for name in whole.tensors)


def test_a_model_that_is_no_chain_of_layers_is_read_whole(tokenizer: Any) -> None:
    model, rows = zoo.llama(), seeds(3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.warns(pkt.PktWarning, match="read whole, not layer by layer"):
        found = teach(model, rows, tokenizer, top=67)
    for index, p in enumerate(truth(model, rows)):
        assert float((spread(found, index, 67) - p).abs().max()) < 1e-5


def test_a_batch_too_large_for_the_memory_is_halved(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = zoo.llama(), seeds(5)
    whole, plain, most = teach(model, rows, tokenizer), LayeredModel.call, []

    def call(self: LayeredModel, index: int, hidden: Tensor, given: Any) -> Tensor:
        most.append(len(hidden))
        if index == 1 and len(hidden) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, index, hidden, given)

    monkeypatch.setattr(LayeredModel, "call", call)
    found = teach(model, rows, tokenizer)
    assert most[-1] <= 2
    assert all(torch.equal(whole.tensors[name], found.tensors[name]) for name in whole.tensors)


# -- interruptions

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "pkt.teaching", "oracle"])


def work(folder: Path, out: str, slow: float, tell: Any) -> None:
    torch.set_num_threads(1)
    passes.PASS_TOKENS["cpu"] = 40
    plain = LayeredModel.call

    def call(self: LayeredModel, *args: Any) -> Any:
        time.sleep(slow)
        return plain(self, *args)

    LayeredModel.call = call  # type: ignore[method-assign]
    tell.send("ready")
    try:
        pkt.teach(folder / "teacher", seeds(9), out=folder / out, batch_size=2, progress=False)
    except pkt.PktError as error:
        tell.send(str(error))
        sys.exit(3)


class Case:
    """A teacher on disk, and the bytes of a run that nothing disturbed."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder = folder
        zoo.llama(vocab=len(tokenizer)).save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
        assert self.run("calm") == 0
        self.bytes = self.read("calm")

    def run(self, out: str, *, slow: float = 0.0, kill_after: float | None = None) -> int:
        ear, tell = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=work, args=(self.folder, out, slow, tell), daemon=True)
        process.start()
        tell.close()
        ear.recv()
        if kill_after is not None:
            process.join(kill_after)
            if process.exitcode is None:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        ear.close()
        assert process.exitcode is not None
        return process.exitcode

    def read(self, out: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (self.folder / out).iterdir()}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Case:
    return Case(tmp_path_factory.mktemp("teach"), tokenizer)


def kills(case: Case, count: int, out: str) -> None:
    """Kill at random moments until `count` have hit; every run that gets through must have the undisturbed bytes."""
    rng, hits = random.Random(0), 0
    while hits < count:
        shutil.rmtree(case.folder / out, ignore_errors=True)
        for _ in range(30):
            code = case.run(out, slow=0.01, kill_after=rng.uniform(0.05, 0.6))
            if code == 0:
                break
            assert code == -9
            hits += 1
        else:
            assert case.run(out) == 0
        assert case.read(out) == case.bytes
        assert not [p.name for p in case.folder.iterdir() if p.name.startswith((f".{out}", ".pkt-"))]


def test_kills_at_random_moments_end_in_the_same_bytes(case: Case) -> None:
    kills(case, 3, "killed")


@pytest.mark.long
def test_many_kills_at_random_moments_end_in_the_same_bytes(case: Case) -> None:
    kills(case, 60, "hunted")


class StopError(Exception):
    """The interruption that a test makes."""


def interrupted(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch, heads: int = 3, **options: Any) -> None:
    """A run that stops when so many passes are over."""
    monkeypatch.setitem(passes.PASS_TOKENS, "cpu", 40)
    over: list[int] = []

    def tick(now: Any) -> None:
        if now.phase == "forward" and now.layer == 0 and len(over) == heads:
            raise StopError
        over.extend([1] * (now.phase == "head"))

    with pytest.raises(StopError):
        pkt.teach(case.folder / "teacher", seeds(9), out=out, batch_size=2, progress=False, on_tick=tick, **options)


def test_a_kill_when_all_is_written_leaves_what_the_same_command_finds(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("pkt.teaching.reading.Targets.load", lambda folder: (_ for _ in ()).throw(StopError))
        patch.setattr("pkt.transferring.checkpoints.shutil.rmtree", lambda *args, **options: None)
        with pytest.raises(StopError):
            pkt.teach(case.folder / "teacher", seeds(9), out=out, batch_size=2, progress=False)
    assert (tmp_path / ".out.run" / "run.json").is_file()
    pkt.teach(case.folder / "teacher", seeds(9), out=out, batch_size=2, progress=False)
    assert {p.name for p in out.iterdir()} == case.bytes.keys()
    assert not (tmp_path / ".out.run").exists()


def test_finished_passes_are_not_read_again(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(case, tmp_path / "out", monkeypatch)
    (count,) = re.findall(r"3 of (\d+) passes are finished", run("inspect", tmp_path / "out"))
    done: list[int] = []
    plain = Forward.run
    monkeypatch.setattr(Forward, "run", lambda self, *args: done.append(1) or plain(self, *args))
    pkt.teach(case.folder / "teacher", seeds(9), out=tmp_path / "out", batch_size=2, progress=False)
    assert len(done) == int(count) - 3 > 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == case.bytes


def test_other_inputs_and_damaged_passes_are_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(case, out, monkeypatch)
    given: Any = {"out": out, "batch_size": 2, "progress": False}
    for change, named in (({"draws": 8}, "size: 64 there, 8 here"), ({"seed": 1}, "seed"), ({"top": 4}, "form")):
        with pytest.raises(pkt.PktError, match=f"other inputs.*{named}"):
            pkt.teach(case.folder / "teacher", seeds(9), **given, **change)
    with pytest.raises(pkt.PktError, match=r"other inputs \(rows changed\)"):
        pkt.teach(case.folder / "teacher", seeds(8), **given)
    step = tmp_path / ".out.run" / "step-0001.safetensors"
    whole = step.read_bytes()
    step.write_bytes(whole[:-3])
    with pytest.raises(pkt.PktError, match=r"step-0001.safetensors is damaged.*--force"):
        pkt.teach(case.folder / "teacher", seeds(9), **given)
    assert len(pkt.teach(case.folder / "teacher", seeds(9), **given, force=True)) == 9


def test_micro_batches_have_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setitem(passes.MICRO_TOKENS, "cpu", 100)
    lengths = [250, 60, 50, 50, 20, 9, 9, 9, 9, 9, 9]
    assert passes.micro_batches(lengths, 4, cpu) == [1, 1, 2, 4, 3]
    assert passes.micro_batches(lengths, 4, torch.device("cuda")) == [4, 4, 3]


def test_a_full_disk_in_the_middle_can_be_continued(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setitem(passes.PASS_TOKENS, "cpu", 40)
    sizes = [p.stat().st_size for p in (case.folder / "calm").glob("*.safetensors")]
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] // 2, limits[1]))
    try:
        with pytest.raises(pkt.PktError, match="file-size limit"):
            pkt.teach(case.folder / "teacher", seeds(9), out=out, batch_size=2, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not out.exists()
    assert list((tmp_path / ".out.run").glob("step-*"))
    pkt.teach(case.folder / "teacher", seeds(9), out=out, batch_size=2, progress=False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == case.bytes


# -- the command, and what is refused


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = (DATA / "train.jsonl").read_text().splitlines()[:12]
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", *rows)


def test_the_command_writes_targets_of_the_demos_teacher(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "targets"
    said = run("teach", ASSETS / "teacher", few, "--out", out, "--device", "cpu", "--dtype", "float32")
    assert "64 draws for" in said
    assert "pkt train STUDENT" in said
    found = Targets.load(out)
    # The teacher knows this task.
    assert found.told["nll"] < 0.05
    assert found.bytes_a_token <= 200
    told = json.loads(run("inspect", out, "--json"))
    assert told["is"].startswith("a teacher's next-token distributions")
    # The same command finds its result there; another one does not replace it unasked.
    given = ["teach", ASSETS / "teacher", few, "--out", out, "--device", "cpu", "--dtype", "float32"]
    before = (out / "targets.safetensors").stat().st_mtime_ns
    assert "64 draws for" in run(*given)
    assert (out / "targets.safetensors").stat().st_mtime_ns == before
    assert "already holds a result of pkt, of other inputs (size: 64 there, 8 here)" in fails(*given, "--draws", 8)
    again = json.loads(run("teach", ASSETS / "teacher", few, "--out", out, "--force", "--json", "--top", 4))
    assert (again["form"], again["size"]) == ("top", 4)


def test_general_text_takes_few_bytes_a_token(tmp_path: Path) -> None:
    rows = load_seeds(DATA / "general.jsonl", str(ASSETS / "base"), limit=40)
    assert teach(ASSETS / "base", rows, dtype=torch.float32).bytes_a_token <= 200


def test_bad_input_is_one_line(few: Path, tmp_path: Path, tokenizer: Any) -> None:
    out, teacher = tmp_path / "out", ASSETS / "teacher"
    for given, words in (
        (["--draws", 0], "draws=0 must be a whole number from 1"),
        (["--top", 5000], "top=5000 must be"),
        (["--top", 600], "top=600 is more than the 512 tokens"),
        (["--top", 4, "--draws", 4], "exclude each other"),
        (["--seed", -1], "seed=-1"),
        (["--batch-size", 0], "batch_size=0"),
        (["--device-memory", "1MB"], "one row at a time needs"),
        (["--max-length", 4], "no target token is left"),
        (["--generate", "--draws", 4], "leave --draws and --top out"),
        (["--generate", "--device-memory", "1GB"], "held in memory whole"),
        (["--max-new-tokens", 4], "give --generate too"),
    ):
        said = fails("teach", teacher, few, "--out", out, *given)
        assert words in said
        assert len(said.splitlines()) == 1
        assert empty_beside(out)
    with pytest.raises(pkt.PktError, match="needs its tokenizer"):
        teach(zoo.llama(), seeds())
    with pytest.raises(pkt.PktError, match=r"lie one in the other|are the same folder"):
        pkt.teach(teacher, few, out=teacher / "targets", progress=False)


def test_rows_of_another_tokenizer_are_refused_with_the_way_out(few: Path, tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "student", tmp_path / "student")
    file = tmp_path / "student" / "tokenizer.json"
    found = json.loads(file.read_text())
    vocabulary = found["model"]["vocab"]
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(found))
    said = fails("teach", ASSETS / "teacher", few, "--out", tmp_path / "out", "--tokenizer", tmp_path / "student")
    assert "numbers its tokens otherwise" in said
    assert "pkt teach --generate" in said


def test_a_teachers_folder_needs_no_tokenizer_where_one_is_given(tokenizer: Any, tmp_path: Path) -> None:
    zoo.llama().save_pretrained(tmp_path / "bare")
    assert len(teach(tmp_path / "bare", seeds(2), tokenizer)) == 2
    with pytest.raises(pkt.PktError, match="no usable tokenizer"):
        teach(tmp_path / "bare", seeds(2))


def test_broken_weights_name_the_row(tokenizer: Any) -> None:
    model = zoo.llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(pkt.PktError, match=r"seeds.jsonl:\d+: the teacher's probabilities are not numbers"):
        teach(model, seeds(3), tokenizer)


def test_the_teachers_answers_are_rows_again(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    run("teach", ASSETS / "teacher", few, "--generate", "--max-new-tokens", 40, "--out", out, "--device", "cpu")
    old, new = ([json.loads(line) for line in file.read_text().splitlines()] for file in (few, out))
    assert [row["messages"][0] for row in new] == [row["messages"][0] for row in old]
    # The teacher answers every problem right.
    ends = [[row["messages"][-1]["content"].rpartition("####")[2] for row in rows] for rows in (old, new)]
    assert ends[0] == ends[1]
    assert "is there already" in fails("teach", ASSETS / "teacher", few, "--generate", "--out", out)
    assert "name another" in fails("teach", ASSETS / "teacher", few, "--generate", "--out", few, "--force")
    rows = write_rows(tmp_path / "pairs.jsonl", {"prompt": "What is 7+5?", "completion": " 12"}, {"text": "no prompt"})
    said = fails("teach", ASSETS / "teacher", rows, "--generate", "--out", tmp_path / "new.jsonl")
    assert "pairs.jsonl:2: the row has no prompt to answer" in said
    assert not (tmp_path / "new.jsonl").exists()


def test_the_plan_is_kept_to(few: Path) -> None:
    told: list[Any] = []
    teach(ASSETS / "teacher", few, dtype=torch.float32, device_memory="60MB", on_memory=told.append)
    assert told[0].device_total <= parse_size("60MB")  # type: ignore[operator]
    assert all(part for part in told[0].lines())


def test_loading_is_that_of_transformers(few: Path) -> None:
    """bf16 weights, widened: the same distributions as the loaded model's."""
    found = teach(ASSETS / "teacher", few, top=512, dtype=torch.float32)
    rows = load_seeds(few, str(ASSETS / "teacher"))
    model = load_model(ASSETS / "teacher", dtype=torch.float32)
    for index, p in enumerate(truth(model, rows)):
        assert float((spread(found, index, 512) - p).abs().max()) < 1e-4
    assert found.told["rows"]["count"] == len(rows)
