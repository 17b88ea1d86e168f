"""The kernels against their rivals: same inputs, one group of one run, correctness first.

    python bench/bench_kernels.py [--device cuda|cpu] [--groups linear,...] [--model 13b] [--sweep] [--tiny] [--out DIR]

Rates are shares of ceilings measured in the same run: a large copy and a large product (`measuring.Bench`). Writes
DIR/kernels_<device>.json (kernels_<device>_<model>.json, kernels_tiny.json) after every group and prints a row a rival. Ops are
called as `torch.ops.pkt.*`, whatever implements them there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from measuring import RESULTS, Report, Run, kind_of  # noqa: E402
from measuring import Bench as Harness  # noqa: E402

from pkt import ops  # noqa: E402
from pkt.ops import candidates  # noqa: E402
from pkt.ops.candidates import Kind  # noqa: E402

pkt_ops = torch.ops.pkt
Bounds = list[tuple[int, int]]
TILE = 64


class Bench(Harness):
    """The harness with the shapes of its device, and inputs there."""

    def __init__(
        self, report: Report, device: str, rounds: int, budget: float, tiny: bool, compiles: bool = True
    ) -> None:
        super().__init__(report, device, rounds, budget)
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.tiny, self.compiles = tiny, compiles

    def sized(self, on_cuda: Any, on_cpu: Any, tiny: Any) -> Any:
        return tiny if self.tiny else on_cuda if self.cuda else on_cpu

    def compiled(
        self, name: str, function: Callable[..., Any], example: Sequence[Any], run: Callable[[Any], Any]
    ) -> dict[str, Run]:
        """A rival: run(torch.compile of a formula), which has compiled on `example`, so that no compiling is timed."""
        if not self.compiles:
            return {}
        made = torch.compile(function, dynamic=False)
        with contextlib.suppress(Exception):  # told where it is timed
            made(*example)
        return {name: lambda: run(made)}

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, dtype=dtype or self.dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device)


def agree(found: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    """No time is reported for a wrong answer."""
    error = float((found.double() - truth.double()).norm() / truth.double().norm())
    if not error <= tolerance:
        raise SystemExit(f"{what}: relative error {error:.2e} against fp64, {tolerance:.0e} allowed; nothing is timed")


# --- groups ---------------------------------------------------------------------------------------------------------


def sample_bounds(bench: Bench, samples: int, tokens: int, ragged: bool) -> tuple[Tensor, Tensor, int]:
    """seq_starts, seq_lens of a padded batch, and the number of rows that are scored."""
    generator = torch.Generator().manual_seed(0)
    lens = torch.full((samples,), tokens)
    if ragged:
        lens = torch.randint(tokens // 4, tokens + 1, (samples,), generator=generator)
    return (torch.arange(samples) * tokens).to(bench.device), lens.to(bench.device), int(lens.sum())


def linear_inputs(bench: Bench, n: int, m: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return bench.random(n, m), bench.random(rows, m), bench.random(rows, n)


def per_sample(run: Callable[..., Any], acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, bounds: Bounds) -> None:
    for start, length in bounds:
        run(acc, w, x[start : start + length], dy[start : start + length])


def unfused(acc: Tensor, w: Tensor, x: Tensor, dy: Tensor) -> None:
    acc += (w * (dy.T @ x)).abs_()


def formula(acc: Tensor, w: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    return acc.add_((w * (dy.T @ x)).abs())


def tiles_formula(tiles: Tensor, w: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    scores = (w * (dy.T @ x)).abs().float()
    return tiles.add_(scores.view(tiles.shape[0], TILE, tiles.shape[1], TILE).sum((1, 3)))


def batched(acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, samples: int) -> None:
    """Every sample's gradient at once, which is what vmap over grad runs."""
    gradients = torch.bmm(dy.view(samples, -1, dy.shape[1]).transpose(1, 2), x.view(samples, -1, x.shape[1]))
    acc += w.abs() * gradients.abs_().sum(0)


def bench_linear(bench: Bench) -> None:
    shapes = bench.sized([(4096, 4096), (11008, 4096), (13824, 5120)], [(768, 768), (2048, 768)], [(128, 64)])
    for ragged in (False, True):
        for n, m in shapes:
            bench_one_linear(bench, n, m, ragged)


def bench_one_linear(bench: Bench, n: int, m: int, ragged: bool) -> None:
    samples, tokens = bench.sized((32, 512), (8, 128), (4, 16))
    starts, lens, scored = sample_bounds(bench, samples, tokens, ragged)
    bounds = list(zip(starts.tolist(), lens.tolist(), strict=True))
    w, x, dy = linear_inputs(bench, n, m, samples * tokens)
    acc, tiles = bench.zeros(n, m), bench.zeros(n // TILE, m // TILE)
    pkt_ops.linear_sensitivity_(acc, w, x, dy, starts, lens)
    part = slice(0, min(n, 512))
    truth = torch.zeros(part.stop, m, dtype=torch.float64, device=bench.device)
    for start, length in bounds:
        rows = slice(start, start + length)
        truth += (dy[rows, part].double().T @ x[rows].double()).abs()
    agree(acc[part], truth * w[part].double().abs(), 1e-5, f"linear_sensitivity {n}x{m}")
    out = torch.empty_like(w)

    rivals: dict[str, Run] = {
        "pkt": lambda: pkt_ops.linear_sensitivity_(acc, w, x, dy, starts, lens),
        "pkt, tile sums": lambda: pkt_ops.linear_sensitivity_tiles_(tiles, w, x, dy, starts, lens, TILE),
        "unfused per-sample loop": lambda: per_sample(unfused, acc, w, x, dy, bounds),
    }
    for kind in (Kind(0, bench.dtype, 1, True), Kind(TILE, bench.dtype, 1, True)):
        for name in able(bench, kind.tile) if bench.cuda else ():
            run = functools.partial(candidates.run, name, kind, tiles if kind.tile else acc, w, x, dy, starts, lens)
            if not kind.tile:
                acc.zero_()
                run()
                agree(acc[part], truth * w[part].double().abs(), 1e-5, f"{name} {n}x{m}")
            rivals[f"pkt, {name}{', tile sums' if kind.tile else ''}"] = run
    if not ragged:
        # Over padding these would do more than what is scored, or compile once a length.
        rivals["one plain product"] = lambda: torch.mm(dy.T, x, out=out)
        rivals["batched (vmap of grad)"] = lambda: batched(acc, w, x, dy, samples)
        first = w, x[:tokens], dy[:tokens]
        rivals |= bench.compiled(
            "torch.compile, per sample", formula, (acc, *first), lambda made: per_sample(made, acc, w, x, dy, bounds)
        )
        rivals |= bench.compiled(
            "torch.compile, tile sums",
            tiles_formula,
            (tiles, *first),
            lambda made: per_sample(made, tiles, w, x, dy, bounds),
        )
    kind = "ragged" if ragged else f"{samples}x{tokens}"
    bench.group(f"linear_sensitivity {n}x{m} {kind}", rivals, flops=2 * n * m * scored)


def able(bench: Bench, tile: int) -> list[str]:
    """The kernels by name that run on the device and take these rows: `pkt` is the one that was chosen of them."""
    others = [name for name in candidates.MODULES if name != candidates.STANDARD]
    there = [name for name in others if candidates.obstacle(name, bench.device) is None]
    return [candidates.STANDARD, *(name for name in there if candidates.kernel(name).serves(bench.dtype, tile))]


def accumulate(acc: Tensor, theta: Tensor, grad: Tensor) -> Tensor:
    return acc.add_((theta * grad).abs())


def accumulate_many(accs: list[Tensor], thetas: list[Tensor], grads: list[Tensor]) -> None:
    for row in zip(accs, thetas, grads, strict=True):
        accumulate(*row)


def bench_accumulate(bench: Bench) -> None:
    n, m = bench.sized((11008, 4096), (4096, 4096), (128, 64))
    theta, grad, acc = bench.random(n, m), bench.random(n, m), bench.zeros(n, m)
    pkt_ops.abs_accumulate_(acc, theta, grad)
    agree(acc, (theta.double() * grad.double()).abs(), 1e-6, "abs_accumulate")
    bench.group(
        f"abs_accumulate {n}x{m}",
        {
            "pkt": lambda: pkt_ops.abs_accumulate_(acc, theta, grad),
            "torch": lambda: acc.add_((theta * grad).abs_()),
        }
        | bench.compiled("torch.compile", accumulate, (acc, theta, grad), lambda made: made(acc, theta, grad)),
        bytes_moved=acc.numel() * (8 + 2 * theta.element_size()),
    )
    count, width = bench.sized((80, 5120), (80, 5120), (3, 64))
    thetas, grads = ([bench.random(width) for _ in range(count)] for _ in range(2))
    accs = [bench.zeros(width) for _ in range(count)]
    bench.group(
        f"abs_accumulate {count} norms of {width}",
        {
            "pkt": lambda: pkt_ops.abs_accumulate_many_(accs, thetas, grads),
            "pkt, one by one": lambda: [pkt_ops.abs_accumulate_(*row) for row in zip(accs, thetas, grads, strict=True)],
            "torch foreach": lambda: torch._foreach_add_(accs, torch._foreach_abs(torch._foreach_mul(thetas, grads))),
        }
        | bench.compiled(
            "torch.compile", accumulate_many, (accs, thetas, grads), lambda made: made(accs, thetas, grads)
        ),
    )


def bench_embedding(bench: Bench) -> None:
    vocabulary, width, samples, tokens = bench.sized((32000, 5120, 32, 512), (8192, 768, 8, 128), (64, 32, 4, 16))
    starts, lens, scored = sample_bounds(bench, samples, tokens, ragged=False)
    ids = torch.randint(0, vocabulary, (scored,), device=bench.device)
    ids[::10] = 13
    w, dy, acc = bench.random(vocabulary, width), bench.random(scored, width), bench.zeros(vocabulary, width)

    def scatter_per_sample(acc: Tensor, work: torch.dtype) -> None:
        for j in range(samples):
            rows = slice(j * tokens, (j + 1) * tokens)
            gradient = torch.zeros(w.shape, dtype=work, device=w.device).index_add_(0, ids[rows], dy[rows].to(work))
            acc += (w.to(work) * gradient).abs_()

    pkt_ops.embedding_sensitivity_(acc, w, ids, dy, starts, lens)
    truth = torch.zeros_like(acc, dtype=torch.float64)
    scatter_per_sample(truth, torch.float64)
    agree(acc, truth, 1e-5, "embedding_sensitivity")
    del truth
    touched = len(ids.unique())

    def scatter(acc: Tensor, ids: Tensor, dy: Tensor) -> Tensor:
        gradient = torch.zeros(acc.shape, device=acc.device).index_add_(0, ids, dy.float())
        return acc.add_((w.float() * gradient).abs())

    bench.group(
        f"embedding_sensitivity {vocabulary}x{width}",
        {
            "pkt": lambda: pkt_ops.embedding_sensitivity_(acc, w, ids, dy, starts, lens),
            "per-sample scatter": lambda: scatter_per_sample(acc, torch.float32),
        }
        | bench.compiled(
            "torch.compile, per sample",
            scatter,
            (acc, ids[:tokens], dy[:tokens]),
            lambda made: [made(acc, ids[a : a + tokens], dy[a : a + tokens]) for a in range(0, scored, tokens)],
        ),
        bytes_moved=dy.numel() * dy.element_size() + touched * width * (8 + w.element_size()),
    )


def prefix_window(score: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """`pkt::best_window` by a summed-area table of the quantized scores; the table's wrap-around cancels."""
    exponent = torch.frexp(score.max().double()).exponent
    unit = torch.ones((), dtype=torch.float64, device=score.device)
    scale = torch.ldexp(unit, ops.window_bits(rows, cols) - exponent)
    whole = (score.double() * scale + 0.5).floor().long().cumsum(0).cumsum(1)
    table = torch.nn.functional.pad(whole, (1, 0, 1, 0))
    sums = table[rows:, cols:] - table[:-rows, cols:] - table[rows:, :-cols] + table[:-rows, :-cols]
    flat = sums.flatten()
    total = flat.max()
    # The first of those that share the largest sum.
    first = torch.where(flat == total, torch.arange(len(flat), device=flat.device), len(flat)).min()
    return torch.stack([first // sums.shape[1], first % sums.shape[1]]), total


def best_lines(line: Tensor, count: int) -> Tensor:
    """`pkt::best_blocks` of one axis in blocks of 4, by the axis's sums."""
    return line.view(-1, 4).sum(1).sort(descending=True, stable=True).indices[:count].sort().values


def bench_window(bench: Bench) -> None:
    (n, m), (rows, cols) = bench.sized(
        ((13824, 5120), (11008, 4096)), ((2048, 768), (1408, 512)), ((128, 64), (100, 40))
    )
    score = torch.rand(n, m, device=bench.device) ** 4
    found = [value.tolist() for value in pkt_ops.best_window(score, rows, cols)]
    wanted = [value.tolist() for value in prefix_window(score, rows, cols)]
    if found != wanted:
        raise SystemExit(f"best_window: {found} where prefix sums give {wanted}; nothing is timed")
    bench.group(
        f"best_window {n}x{m} -> {rows}x{cols}",
        {
            "pkt": lambda: pkt_ops.best_window(score, rows, cols),
            "one read (amax)": lambda: score.amax(),
            "prefix sums in torch": lambda: prefix_window(score, rows, cols),
        }
        | bench.compiled("torch.compile", prefix_window, (score, rows, cols), lambda made: made(score, rows, cols)),
        bytes_moved=score.numel() * 4,
    )
    bench.group(
        f"best_blocks {n}x{m} -> {rows}x{cols}",
        {
            "pkt": lambda: pkt_ops.best_blocks(score, rows // 4, cols // 4, 4, 4),
            "one read (amax)": lambda: score.amax(),
            "two sums in fp64": lambda: [
                best_lines(ops.double_sum(score, 1 - a), (rows, cols)[a] // 4) for a in (0, 1)
            ],
        },
        bytes_moved=score.numel() * 4,
    )
    if not bench.cuda:
        return
    from pkt_kernels.window_search import axis_sums, block_sums

    agree(axis_sums(score)[0], score.double().sum(1), 1e-9, "axis_sums")
    bench.group(
        f"axis_sums {n}x{m}",
        {"pkt": lambda: axis_sums(score), "torch": lambda: (score.sum(0), score.sum(1))},
        bytes_moved=score.numel() * 4,
    )
    bench.group(
        f"block_sums {n}x{m} by 64",
        {
            "pkt": lambda: block_sums(score, 64),
            "torch": lambda: score.view(n // 64, 64, m // 64, 64).sum((1, 3)),
        },
        bytes_moved=score.numel() * 4,
    )


GROUPS = {
    "linear": bench_linear,
    "accumulate": bench_accumulate,
    "embedding": bench_embedding,
    "window": bench_window,
}


# --- tuning and whole models ----------------------------------------------------------------------------------------


def sweep(bench: Bench) -> None:
    """Every block size worth trying for the fused product: the numbers behind `linear_sensitivity.TUNED` and `BAND`."""
    from pkt_kernels import linear_sensitivity

    shapes = [
        (128, 128, 64),
        (128, 128, 128),
        (128, 128, 32),
        (128, 64, 64),
        (64, 128, 64),
        (64, 64, 64),
        (64, 64, 128),
    ]
    candidates = [(shape, stages, 8) for shape in shapes for stages in (3, 4, 5)]
    candidates += [(shape, 4, band) for shape in shapes[:2] for band in (4, 16)]
    kept = linear_sensitivity.choose_blocks, linear_sensitivity.BAND
    starts, lens, scored = sample_bounds(bench, 32, 512, ragged=False)
    bounds = list(zip(starts.tolist(), lens.tolist(), strict=True))

    def run_with(blocks: Any, band: int, *inputs: Tensor) -> None:
        linear_sensitivity.choose_blocks, linear_sensitivity.BAND = (lambda *_: blocks), band
        linear_sensitivity.linear_sensitivity(*inputs, starts, lens)

    for n, m in ((4096, 4096), (13824, 5120)):
        w, x, dy = linear_inputs(bench, n, m, scored)
        acc, truth = bench.zeros(n, m), bench.zeros(n, m)
        per_sample(unfused, truth, w.float(), x, dy, bounds)
        rivals: dict[str, Run] = {}
        for shape, stages, band in candidates:
            warps = 8 if shape[0] * shape[1] > 8192 else 4
            blocks = linear_sensitivity.Blocks(*shape, num_warps=warps, num_stages=stages, speed=1.0)
            run = functools.partial(run_with, blocks, band, acc, w, x, dy)
            try:
                acc.zero_()
                run()
                agree(acc, truth, 1e-2, str(blocks))
            except (Exception, SystemExit) as error:
                print(f"{blocks}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
                continue
            rivals[f"{blocks.n}x{blocks.m}x{blocks.t}, {stages} stages, band {band}"] = run
        bench.group(f"sweep linear_sensitivity {n}x{m}", rivals, flops=2 * n * m * scored)
    linear_sensitivity.choose_blocks, linear_sensitivity.BAND = kept


MODELS = {
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def bench_model(bench: Bench, size: str, samples: int, tokens: int, batch: int) -> None:
    """pkt.sensitivity of a randomly initialised Llama against backward passes that free each gradient at once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import pkt

    config = LlamaConfig(**MODELS[size], vocab_size=32000, max_position_embeddings=4096, use_cache=False)
    with torch.device(bench.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(bench.dtype)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(default)
    parameters = sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, 32000, (samples, tokens), device=bench.device)
    loader = [
        {
            "input_ids": ids[i : i + batch],
            "attention_mask": torch.ones_like(ids[i : i + batch]),
            "labels": ids[i : i + batch],
        }
        for i in range(0, samples, batch)
    ]

    def backward(per_step: int) -> None:
        """Plain gradients, a batch at a time, each freed as soon as it is there: no scores are kept."""

        def free(parameter: Tensor) -> None:
            parameter.grad = None

        hooks = [p.register_post_accumulate_grad_hook(free) for p in model.parameters()]
        for i in range(0, samples, per_step):
            model(input_ids=ids[i : i + per_step], labels=ids[i : i + per_step]).loss.backward()
        for hook in hooks:
            hook.remove()

    rivals: dict[str, Run] = {"pkt, tile sums": lambda: pkt.sensitivity(model, loader, tile=64, progress=False)}
    if not bench.cuda or torch.cuda.mem_get_info()[1] > parameters * (4 + bench.dtype.itemsize) * 1.15:
        rivals["pkt, elements"] = lambda: pkt.sensitivity(model, loader, progress=False)
    rivals[f"backward only, batch {batch}"] = lambda: backward(batch)
    rivals["backward only, per sample"] = lambda: backward(1)
    pkt.sensitivity(model, [{key: value[:1, :64] for key, value in loader[0].items()}], tile=64, progress=False)
    # Forward, input gradients and weight gradients; each runs once.
    flops = 6 * parameters * samples * tokens
    bench.group(f"llama {size} {samples}x{tokens}", rivals, flops=flops, budget=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--groups", default=",".join(GROUPS), help="comma-separated, of " + ", ".join(GROUPS))
    parser.add_argument("--model", choices=MODELS, help="time a whole model of that shape instead")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="samples a forward pass of the whole model")
    parser.add_argument("--sweep", action="store_true", help="time every block size of the fused product instead")
    parser.add_argument("--tiny", action="store_true", help="shapes that show whether it runs, and nothing else")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes seconds a shape")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds a rival may run in a group")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.tiny:
        options.samples, options.tokens, options.batch, options.rounds = 4, 16, 2, 2
    works: dict[str, Callable[[Bench], None]] = {name: GROUPS[name] for name in filter(None, options.groups.split(","))}
    label = options.model or ("sweep" if options.sweep else "")
    if options.model:
        shape = options.samples, options.tokens, options.batch
        works = {label: lambda bench: bench_model(bench, options.model, *shape)}
    elif options.sweep:
        works = {label: sweep}
    path = options.out / f"kernels_{kind_of(options.device, options.tiny)}{'_' if label else ''}{label}.json"
    report = Report(path, options.device, rounds=options.rounds)
    bench = Bench(
        report, options.device, options.rounds, options.budget, options.tiny, not (options.tiny or options.no_compile)
    )
    bench.measure_ceilings(tiny=options.tiny)
    for name, work in works.items():
        try:
            work(bench)
        except (Exception, SystemExit) as error:
            report.fail(name, error)
        if bench.cuda:
            torch.cuda.empty_cache()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
