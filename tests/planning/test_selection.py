"""Regions against brute force, layers, and plans."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import oracle
import pytest
import torch
import zoo
from torch import Tensor

import pkt
from pkt import ops
from pkt.models import spec_of
from pkt.ops import reference
from pkt.options import Select
from pkt.planning.regions import STRATEGIES, Asking, Region, Wanted, select_layers, select_region, together, window


def brute_force(score: np.ndarray, rows: int, cols: int, row_step: int = 1, col_step: int = 1) -> tuple[int, int]:
    """The first window in row-major order with the largest sum, in exact Python integers."""
    best, where = None, (0, 0)
    for r in range(0, score.shape[0] - rows + 1, row_step):
        for c in range(0, score.shape[1] - cols + 1, col_step):
            total = sum(int(v) for v in score[r : r + rows, c : c + cols].flat)
            if best is None or total > best:
                best, where = total, (r, c)
    return where


@pytest.mark.parametrize("values", [2, 7, 1000])
def test_windows_equal_brute_force_on_random_matrices_ties_included(values: int) -> None:
    rng = np.random.default_rng(values)
    for case in range(70):
        n, m = (int(i) for i in rng.integers(1, 14, 2))
        rows, cols = int(rng.integers(1, n + 1)), int(rng.integers(1, m + 1))
        steps = (1, 1) if case % 3 else tuple(int(i) for i in rng.integers(1, 4, 2))
        score = rng.integers(0, values, (n, m))
        offset, _ = ops.best_window(torch.from_numpy(score).float(), rows, cols, *steps)
        assert tuple(offset.tolist()) == brute_force(score, rows, cols, *steps)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_window_search_is_that_of_torch(threads: int) -> None:
    if ops.implementation("best_window", "cpu")[0] != "C++":
        pytest.skip("pkt._C is not built")
    rng, before = np.random.default_rng(0), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for trial in range(60):
            n, m = rng.integers(1, 300, 2).tolist()
            rows, cols, *steps = (int(rng.integers(1, top + 1)) for top in (n, m, 4, 4))
            score = torch.from_numpy(rng.random((m, n) if trial % 3 == 1 else (n, 2 * m))).float()
            score = score.t() if trial % 3 == 1 else score[:, ::2] if trial % 3 == 2 else score[:, :m]
            if trial % 2:
                score = (4 * score).floor() / 4  # ties
            for one, other in zip(
                torch.ops.pkt.best_window(score, rows, cols, *steps),
                reference.best_window(score, rows, cols, *steps),
                strict=True,
            ):
                assert torch.equal(one, other), (n, m, rows, cols, steps)
    finally:
        torch.set_num_threads(before)


def test_window_sums_are_exact_where_fp32_prefix_sums_are_not() -> None:
    score = torch.full((300, 400), 1.0)
    score[200, 300] = 1.0 + 2**-20
    offset, total = ops.best_window(score, 100, 100)
    assert offset.tolist() == [101, 201]
    bits = ops.window_bits(100, 100)
    assert total.item() == (10000 + 2**-20) * 2.0 ** (bits - 1)


def test_window_search_survives_zeros_and_wide_ranges() -> None:
    assert ops.best_window(torch.zeros(5, 6), 2, 3)[0].tolist() == [0, 0]
    score = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) * 1e-30
    truth = max(
        itertools.product(range(31), range(31)),
        key=lambda rc: score.double()[rc[0] : rc[0] + 10, rc[1] : rc[1] + 20].sum(),
    )
    assert tuple(ops.best_window(score, 10, 20)[0].tolist()) == truth
    assert ops.window_bits(1 << 17, 1 << 13) == 32


def test_rows_cols_and_weights_take_the_highest() -> None:
    score = torch.rand(12, 17, generator=torch.Generator().manual_seed(0))
    matrix = torch.arange(12 * 17.0).view(12, 17)
    region = select_region(score, "rows_cols", Wanted((12, 17), (5, 9)))
    rows = score.double().sum(1).topk(5).indices.sort().values
    cols = score.double().sum(0).topk(9).indices.sort().values
    assert torch.equal(region.cut(matrix), matrix[rows][:, cols])
    region = select_region(score, "weights", Wanted((12, 17), (5, 9)))
    kept = score.flatten().topk(45).indices.sort().values
    assert torch.equal(region.cut(matrix), matrix.flatten()[kept].view(5, 9))


def test_blocks_take_the_best_row_and_column_blocks() -> None:
    score = torch.rand(24, 32, generator=torch.Generator().manual_seed(3))
    region = select_region(score, "blocks", Wanted((24, 32), (16, 8)))
    row_sums, col_sums = score.double().view(3, 8, 32).sum((1, 2)), score.double().view(24, 4, 8).sum((0, 2))
    rows = torch.cat([torch.arange(8) + 8 * i for i in row_sums.topk(2).indices.sort().values])
    cols = torch.arange(8) + 8 * int(col_sums.argmax())
    assert torch.equal(region.cut(score), score[rows][:, cols])


@pytest.mark.parametrize(("select", "size", "sides"), [("rows_cols", (7, 5), (1, 1)), ("blocks", (8, 3), (8, 3))])
@pytest.mark.parametrize("values", [3, 1000])
def test_the_op_that_chooses_on_a_gpu_chooses_what_the_cpu_does(
    select: Any, size: tuple[int, int], sides: tuple[int, int], values: int
) -> None:
    rng = np.random.default_rng(values)
    for _ in range(20):
        score = torch.from_numpy(rng.integers(0, values, (24, 12))).float()
        region = select_region(score, select, Wanted((24, 12), size))
        picked = ops.best_blocks(score, size[0] // sides[0], size[1] // sides[1], *sides)
        for axis, blocks, side in zip((region.rows, region.cols), picked, sides, strict=True):
            assert [p for a, b in axis for p in range(a, b)] == [
                p for i in blocks.tolist() for p in range(i * side, (i + 1) * side)
            ]


def test_a_window_is_a_view_and_equal_shapes_are_the_identity() -> None:
    matrix = torch.rand(10, 12)
    part = window(2, 3, 4, 5).cut(matrix)
    assert part.data_ptr() == matrix[2:, 3:].data_ptr()
    assert tuple(STRATEGIES) == get_args(Select)
    for strategy in STRATEGIES:
        assert select_region(matrix, strategy, Wanted((10, 12), (10, 12))) == window(0, 0, 10, 12)


def test_random_windows_depend_on_seed_and_name_only() -> None:
    score = torch.rand(50, 60)
    make = lambda seed, name: select_region(score, "random", Wanted((50, 60), (20, 20), seed=seed, name=name))  # noqa: E731
    assert make(0, "a") == make(0, "a")
    assert len({make(s, n) for s in range(3) for n in "abc"}) > 5


def test_tile_sums_find_the_window_on_the_tile_grid() -> None:
    score = torch.rand(48, 64, generator=torch.Generator().manual_seed(0))
    score[16:40, 24:56] += 1
    tiles = ops.tile_sums(score, 8)
    region = select_region(tiles, "window", Wanted((48, 64), (24, 32), tile=8))
    assert region == window(16, 24, 24, 32)
    assert select_region(tiles, "blocks", Wanted((48, 64), (24, 32), tile=8)) == Region(
        (24, 32), ((16, 40),), ((24, 56),)
    )
    with pytest.raises(pkt.PktError, match="needs the scores' elements"):
        select_region(tiles, "weights", Wanted((48, 64), (24, 32), tile=8))
    with pytest.raises(pkt.PktError, match="cannot be cut"):
        select_region(tiles, "window", Wanted((48, 64), (20, 32), tile=8))


def test_layers_by_every_choice() -> None:
    scores = torch.tensor([3.0, 9.0, 1.0, 9.0, 5.0])
    assert select_layers("sensitivity", 5, 3, scores) == [1, 3, 4]
    assert select_layers("first", 5, 2, None) == [0, 1]
    assert select_layers("last", 5, 2, None) == [3, 4]
    assert select_layers([4, 0], 5, 2, None) == [4, 0]
    chosen = select_layers("random", 5, 3, None, seed=1)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 3
    for bad, message in (([0], "lists 1"), ([0, 7], "do not exist"), ("best", "unknown")):
        with pytest.raises(pkt.PktError, match=message):
            select_layers(bad, 5, 2, scores)
    with pytest.raises(pkt.PktError, match="fewer than"):
        select_layers("sensitivity", 5, 6, scores)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, pkt.Sensitivity]:
    teacher = zoo.llama(hidden=48, layers=4, heads=6, kv=3, ffn=96)
    student = zoo.llama(hidden=32, layers=2, heads=4, kv=2, ffn=64)
    return teacher, student, pkt.sensitivity(teacher, oracle.batched(oracle.token_samples(6), 3), progress=False)


def cut(plan: pkt.TransferPlan, teacher: Any, target: str) -> Tensor:
    entry = next(e for e in plan.entries if e.target == target)
    weight: Tensor = teacher.get_parameter(f"{entry.source}.weight")
    return entry.region.cut(weight)


@pytest.mark.parametrize("select", ["window", "rows_cols", "weights", "blocks", "random", "random_weights"])
@pytest.mark.parametrize("layers", ["sensitivity", "first", "last", "random", [3, 1]])
def test_plans_fit_print_and_round_trip(pair: Any, select: Any, layers: Any, tmp_path: Path) -> None:
    teacher, student, sens = pair
    plan = pkt.plan(sens, teacher, student, select=select, layers=layers)
    places = spec_of(student).by_module()
    assert {e.target for e in plan.entries} == set(places)
    for entry in plan.entries:
        assert tuple(cut(plan, teacher, entry.target).shape) == places[entry.target].shape
        whole = sens[f"{entry.source}.weight"].double()
        assert entry.share == pytest.approx(float(entry.region.cut(whole).sum() / whole.sum()), rel=1e-6)
    plan.to_json(tmp_path / "plan.json")
    assert pkt.TransferPlan.from_json(tmp_path / "plan.json").as_dict() == plan.as_dict()
    text = str(plan)
    assert "model.layers.1.mlp.up_proj" in text
    assert "share of" in text


def test_the_window_catches_more_than_any_other_window(pair: Any) -> None:
    teacher, student, sens = pair
    best, other = (pkt.plan(sens, teacher, student, select=s) for s in ("window", "random"))
    assert all(a.share >= b.share - 1e-9 for a, b in zip(best.entries, other.entries, strict=True))


def test_random_weights_are_drawn_by_seed_and_place(pair: Any) -> None:
    """As many single weights as the student has, in their order, alike for a seed and others for another seed or matrix."""
    teacher, student, sens = pair
    plans = [pkt.plan(sens, teacher, student, select="random_weights", seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([e.region for e in plan.entries] for plan in plans)
    assert first == again
    up = [e for e in plans[0].entries if e.target.endswith("up_proj")]
    assert up[0].region != up[1].region
    assert all(a != b for a, b in zip(first, other, strict=True))
    weight = torch.arange(float(math.prod(up[0].region.source_shape or ()))).view(up[0].region.source_shape or ())
    drawn = up[0].region.cut(weight).flatten()
    assert len(set(drawn.tolist())) == drawn.numel()
    assert drawn.tolist() == sorted(drawn.tolist())
    best = pkt.plan(sens, teacher, student, select="weights")
    assert all(a.share > b.share for a, b in zip(best.entries, plans[0].entries, strict=True))


def test_modules_choose_the_matrices(pair: Any) -> None:
    teacher, student, sens = pair
    count = lambda modules: len(pkt.plan(sens, teacher, student, modules=modules).entries)  # noqa: E731
    assert count("all") == 16
    assert count("attention") == 8
    assert count("ffn") == 6
    assert count("embedding") == 2
    assert count(r"layers\.1\..*(gate|up)_proj") == 2


def test_aligned_heads_start_at_a_head(pair: Any) -> None:
    teacher, student, sens = pair
    plan = pkt.plan(sens, teacher, student, align_heads=True)
    for entry in plan.entries:
        if entry.target.endswith(("q_proj", "k_proj", "v_proj")):
            assert entry.region.rows[0][0] % 8 == 0
        if entry.target.endswith("o_proj"):
            assert entry.region.cols[0][0] % 8 == 0


def test_plan_from_tile_sums(pair: Any) -> None:
    teacher, student, _ = pair
    sens = pkt.sensitivity(teacher, oracle.batched(oracle.token_samples(6), 3), tile=8, progress=False)
    for select in ("window", "blocks"):
        plan = pkt.plan(sens, teacher, student, select=select, modules="ffn|attention" if False else "ffn")
        for entry in plan.entries:
            assert all(a % 8 == 0 for a, _ in (*entry.region.rows, *entry.region.cols))
            assert 0 < entry.share <= 1


class TestBadInput:
    def test_a_teacher_too_small_lists_every_kind_of_module(self, pair: Any) -> None:
        _, student, sens = pair
        small = zoo.llama(hidden=32, layers=4, heads=4, kv=2, ffn=48)
        with pytest.raises(pkt.PktError) as caught:
            pkt.plan(sens, small, student)
        text = str(caught.value)
        assert "(6 of 16 matrices)" in text
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert re.search(rf"model\.layers\.0\.mlp\.{name} .* \(and 1 like it\)", text)
        assert "48 < 64" in text
        assert "q_proj" not in text

    def test_a_teacher_too_shallow(self, pair: Any) -> None:
        teacher, student, sens = pair
        with pytest.raises(pkt.PktError, match="2 layers, fewer than the student's 4"):
            pkt.plan(sens, student, teacher)

    def test_another_architecture_names_the_modules_without_a_source(self, pair: Any) -> None:
        _, student, sens = pair
        with pytest.raises(pkt.PktError, match="no matrix in that place"):
            pkt.plan(sens, zoo.gpt2(hidden=64, layers=4), student)

    def test_different_vocabularies_leave_embeddings_out_and_say_so(self, pair: Any) -> None:
        teacher, _, sens = pair
        other = zoo.llama(hidden=32, layers=2, heads=4, kv=2, ffn=64, vocab=60)
        plan = pkt.plan(sens, teacher, other)
        assert len(plan.entries) == 14
        assert "vocabularies differ (67 and 60 tokens)" in str(plan)

    def test_scores_of_another_model(self, pair: Any) -> None:
        _, student, sens = pair
        other = zoo.llama(hidden=64, layers=4, heads=8, kv=4, ffn=128)
        with pytest.raises(pkt.PktError, match="in the scores of another model"):
            pkt.plan(sens, other, student)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"select": "best"}, "select='best' is unknown"),
            ({"layers": "middle"}, "layers='middle' is unknown"),
            ({"modules": "("}, "nor a regular expression"),
            ({"modules": "nothing"}, "chooses none"),
            ({"select": "blocks", "align_heads": True}, "align_heads concerns windows"),
        ],
    )
    def test_unknown_options(self, pair: Any, options: Any, message: str) -> None:
        teacher, student, sens = pair
        with pytest.raises(pkt.PktError, match=message):
            pkt.plan(sens, teacher, student, **options)

    def test_a_plan_file_that_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        path.write_text('{"format": "x"}')
        with pytest.raises(pkt.PktError, match="not a plan"):
            pkt.TransferPlan.from_json(path)
        path.write_text('{\n "a": }')
        with pytest.raises(pkt.PktError, match=r"plan\.json:2: not valid JSON"):
            pkt.TransferPlan.from_json(path)


def test_works_that_ask_together_are_each_told_their_own_and_end_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions: list[int] = []

    def fetched(tensors: Any) -> Any:
        questions.append(len(tensors))
        return list(tensors)

    def asking(number: int, times: int, dtype: torch.dtype) -> Asking[tuple[int, list[int]]]:
        told = []
        for time in range(times):
            told.append(int((yield torch.tensor(10 * number + time, dtype=dtype))))
        return number, told

    monkeypatch.setattr(ops, "fetched", fetched)
    types = (torch.int64, torch.float64, torch.int64, torch.float64)
    found = together(
        asking(number, times, dtype) for number, (times, dtype) in enumerate(zip((2, 0, 1, 2), types, strict=True))
    )
    assert found == [(0, [0, 1]), (1, []), (2, [20]), (3, [30, 31])]
    # One copy a dtype in each round.
    assert sorted(questions) == [1, 1, 1, 2]
