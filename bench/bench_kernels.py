"""The kernels against their rivals: same inputs, one group of one run, correctness first.

    python bench/bench_kernels.py [--device cuda|cpu] [--groups linear,...] [--model 13b] [--sweep] [--out DIR]

A group is timed in rounds, each rival once a round, so that clocks and neighbours hit all alike; times are medians.
Rates are shares of ceilings measured in the same run: a large copy and a large cuBLAS product. Writes
DIR/kernels_<device>.json and prints a table. Ops are called as `torch.ops.pkt.*`, whatever implements them there.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import pkt.ops  # noqa: E402

pkt_ops = torch.ops.pkt
Run = Callable[[], Any]
Bounds = list[tuple[int, int]]


class Bench:
    """Times groups of rivals on one device and collects their rows."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = torch.device(device), rounds
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.rows: list[dict[str, Any]] = []
        self.ceilings: dict[str, float] = {}

    def time_once(self, run: Run) -> float:
        if not self.cuda:
            time.sleep(0.1)  # threads of the rival before may still be spinning
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, run: Run) -> int | None:
        """Memory a run takes beyond what was there."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def group(self, name: str, rivals: dict[str, Run], flops: float = 0, bytes_moved: float = 0) -> dict[str, float]:
        """Seconds a rival; the first is ours, `flops` and `bytes_moved` are the work's, not the rival's."""
        failed: dict[str, str] = {}
        peaks: dict[str, int | None] = {}
        for rival, run in list(rivals.items()):
            try:
                run()
                peaks[rival] = self.peak_bytes(run)
            except Exception as error:
                if rival == next(iter(rivals)):
                    raise
                failed[rival] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        running = {rival: run for rival, run in rivals.items() if rival not in failed}
        times: dict[str, list[float]] = {rival: [] for rival in running}
        for _ in range(self.rounds):
            for rival, run in running.items():
                times[rival].append(self.time_once(run))
        seconds = {rival: statistics.median(values) for rival, values in times.items()}
        ours = next(iter(seconds.values()))
        for rival, value in seconds.items():
            row: dict[str, Any] = {"group": name, "rival": rival, "ms": value * 1e3, "ours_is_faster_by": value / ours}
            row["spread"] = (max(times[rival]) - min(times[rival])) / value
            row["peak_bytes"] = peaks[rival]
            if flops:
                row["tflops"] = flops / value / 1e12
                row["of_product"] = row["tflops"] / self.ceilings["product_tflops"]
            if bytes_moved:
                row["gbs"] = bytes_moved / value / 1e9
                row["of_copy"] = row["gbs"] / self.ceilings["copy_gbs"]
            self.rows.append(row)
            self.show(row)
        for rival, reason in failed.items():
            self.rows.append({"group": name, "rival": rival, "failed": reason})
            print(f"{name:44} {rival:28} did not run: {reason}", flush=True)
        return seconds

    def show(self, row: dict[str, Any]) -> None:
        rate = f"{row['tflops']:8.2f} TFLOP/s {row['of_product']:6.1%}" if "tflops" in row else ""
        if "gbs" in row:
            rate = f"{row['gbs']:8.1f} GB/s    {row['of_copy']:6.1%}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.1f} MiB"
        ratio = f"{row['ours_is_faster_by']:6.2f}x"
        print(f"{row['group']:44} {row['rival']:28} {row['ms']:10.3f} ms {ratio} {rate:30} {peak}", flush=True)

    def measure_ceilings(self) -> None:
        elements = 2**31 if self.cuda else 2**26
        source = torch.empty(elements, dtype=torch.bfloat16, device=self.device).fill_(1)
        target = torch.empty_like(source)
        size = 8192 if self.cuda else 2048
        a = torch.randn(size, size, dtype=self.dtype, device=self.device)
        b = torch.randn(size, size, dtype=self.dtype, device=self.device)
        out = torch.empty_like(a)
        rivals: dict[str, Run] = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
        for run in rivals.values():
            run()
        times = {
            name: statistics.median(self.time_once(run) for _ in range(self.rounds)) for name, run in rivals.items()
        }
        self.ceilings = {
            "copy_gbs": 2 * source.numel() * source.element_size() / times["copy"] / 1e9,
            "product_tflops": 2 * size**3 / times["product"] / 1e12,
        }
        print(f"ceilings of this run: {self.ceilings}", flush=True)

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


def step(acc: Tensor, w: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    return acc.add_((w * (dy.T @ x)).abs())


def batched(acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, samples: int) -> None:
    """Every sample's gradient at once, which is what vmap over grad runs."""
    gradients = torch.bmm(dy.view(samples, -1, dy.shape[1]).transpose(1, 2), x.view(samples, -1, x.shape[1]))
    acc += w.abs() * gradients.abs_().sum(0)


def bench_linear(bench: Bench) -> None:
    shapes = [(4096, 4096), (11008, 4096), (13824, 5120)] if bench.cuda else [(768, 768), (2048, 768)]
    for ragged in (False, True):
        for n, m in shapes:
            bench_one_linear(bench, n, m, ragged)


def bench_one_linear(bench: Bench, n: int, m: int, ragged: bool) -> None:
    samples, tokens = (32, 512) if bench.cuda else (8, 128)
    starts, lens, scored = sample_bounds(bench, samples, tokens, ragged)
    bounds = list(zip(starts.tolist(), lens.tolist(), strict=True))
    w, x, dy = linear_inputs(bench, n, m, samples * tokens)
    acc, tiles = bench.zeros(n, m), bench.zeros(-(-n // 64), -(-m // 64))
    pkt_ops.linear_sensitivity_(acc, w, x, dy, starts, lens)
    part = slice(0, min(n, 512))
    truth = torch.zeros(part.stop, m, dtype=torch.float64, device=bench.device)
    for start, length in bounds:
        rows = slice(start, start + length)
        truth += (dy[rows, part].double().T @ x[rows].double()).abs()
    agree(acc[part], truth * w[part].double().abs(), 1e-5, f"linear_sensitivity {n}x{m}")
    out = torch.empty_like(w)
    compiled = torch.compile(step, dynamic=False)

    rivals: dict[str, Run] = {
        "pkt": lambda: pkt_ops.linear_sensitivity_(acc, w, x, dy, starts, lens),
        "pkt, tile sums": lambda: pkt_ops.linear_sensitivity_tiles_(tiles, w, x, dy, starts, lens, 64),
        "unfused per-sample loop": lambda: per_sample(unfused, acc, w, x, dy, bounds),
    }
    if not ragged:
        # Over padding these would do more than what is scored, or compile once a length.
        rivals["one plain product"] = lambda: torch.mm(dy.T, x, out=out)
        rivals["batched (vmap of grad)"] = lambda: batched(acc, w, x, dy, samples)
        rivals["torch.compile, per sample"] = lambda: per_sample(compiled, acc, w, x, dy, bounds)
    kind = "ragged" if ragged else f"{samples}x{tokens}"
    bench.group(f"linear_sensitivity {n}x{m} {kind}", rivals, flops=2 * n * m * scored)


def bench_accumulate(bench: Bench) -> None:
    n, m = (11008, 4096) if bench.cuda else (4096, 4096)
    theta, grad, acc = bench.random(n, m), bench.random(n, m), bench.zeros(n, m)
    pkt_ops.abs_accumulate_(acc, theta, grad)
    agree(acc, (theta.double() * grad.double()).abs(), 1e-6, "abs_accumulate")
    compiled = torch.compile(lambda acc, theta, grad: acc.add_((theta * grad).abs()))
    bench.group(
        f"abs_accumulate {n}x{m}",
        {
            "pkt": lambda: pkt_ops.abs_accumulate_(acc, theta, grad),
            "torch": lambda: acc.add_((theta * grad).abs_()),
            "torch.compile": lambda: compiled(acc, theta, grad),
        },
        bytes_moved=acc.numel() * (8 + 2 * theta.element_size()),
    )
    if not bench.cuda:
        return
    from pkt_kernels.abs_accumulate import abs_accumulate_many

    thetas, grads = ([bench.random(5120) for _ in range(80)] for _ in range(2))
    accs = [bench.zeros(5120) for _ in range(80)]
    bench.group(
        "abs_accumulate 80 norms of 5120",
        {
            "pkt, one launch": lambda: abs_accumulate_many(accs, thetas, grads),
            "pkt, one by one": lambda: [pkt_ops.abs_accumulate_(*row) for row in zip(accs, thetas, grads, strict=True)],
            "torch foreach": lambda: torch._foreach_add_(accs, torch._foreach_abs(torch._foreach_mul(thetas, grads))),
        },
    )


def bench_embedding(bench: Bench) -> None:
    vocabulary, width, samples, tokens = (32000, 5120, 32, 512) if bench.cuda else (8192, 768, 8, 128)
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
    bench.group(
        f"embedding_sensitivity {vocabulary}x{width}",
        {
            "pkt": lambda: pkt_ops.embedding_sensitivity_(acc, w, ids, dy, starts, lens),
            "per-sample scatter": lambda: scatter_per_sample(acc, torch.float32),
        },
        bytes_moved=dy.numel() * dy.element_size() + touched * width * (8 + w.element_size()),
    )


def bench_window(bench: Bench) -> None:
    (n, m), (rows, cols) = ((13824, 5120), (11008, 4096)) if bench.cuda else ((2048, 768), (1408, 512))
    score = torch.rand(n, m, device=bench.device) ** 4
    found = [value.tolist() for value in pkt_ops.best_window(score, rows, cols)]
    wanted = [value.tolist() for value in pkt.ops.reference.best_window(score, rows, cols)]
    if found != wanted:
        raise SystemExit(f"best_window: {found} where prefix sums give {wanted}; nothing is timed")
    bench.group(
        f"best_window {n}x{m} -> {rows}x{cols}",
        {
            "pkt": lambda: pkt_ops.best_window(score, rows, cols),
            "one read (amax)": lambda: score.amax(),
            "prefix sums in torch": lambda: pkt.ops.reference.best_window(score, rows, cols),
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
    "tiny": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8},
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

    def one(label: str, run: Run) -> None:
        if bench.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        if bench.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        row = {
            "group": f"llama {size} {samples}x{tokens}",
            "rival": label,
            "ms": seconds * 1e3,
            # Forward, input gradients and weight gradients.
            "tflops": 6 * parameters * samples * tokens / seconds / 1e12,
            "peak_bytes": torch.cuda.max_memory_allocated() if bench.cuda else None,
            "ours_is_faster_by": 1.0,
        }
        row["of_product"] = row["tflops"] / bench.ceilings["product_tflops"]
        ours = next((r for r in bench.rows if r["group"] == row["group"]), row)
        row["ours_is_faster_by"] = row["ms"] / ours["ms"]
        bench.rows.append(row)
        bench.show(row)

    def backward(per_step: int) -> None:
        """Plain gradients, a batch at a time, each freed as soon as it is there: no scores are kept."""

        def free(parameter: Tensor) -> None:
            parameter.grad = None

        hooks = [p.register_post_accumulate_grad_hook(free) for p in model.parameters()]
        for i in range(0, samples, per_step):
            model(input_ids=ids[i : i + per_step], labels=ids[i : i + per_step]).loss.backward()
        for hook in hooks:
            hook.remove()

    warm = [{key: value[:1, :64] for key, value in loader[0].items()}]
    pkt.sensitivity(model, warm, tile=64, progress=False)
    one("pkt, tile sums", lambda: pkt.sensitivity(model, loader, tile=64, progress=False))
    needed = parameters * (4 + bench.dtype.itemsize) * 1.15
    if not bench.cuda or torch.cuda.mem_get_info()[1] > needed:
        one("pkt, elements", lambda: pkt.sensitivity(model, loader, progress=False))
    one(f"backward only, batch {batch}", lambda: backward(batch))
    one("backward only, per sample", lambda: backward(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--groups", default=",".join(GROUPS), help="comma-separated, of " + ", ".join(GROUPS))
    parser.add_argument("--model", choices=MODELS, help="also time a whole model of that shape")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="samples a forward pass of the whole model")
    parser.add_argument("--sweep", action="store_true", help="also time every block size of the fused product")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "bench/results")))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    bench = Bench(arguments.device, arguments.rounds)
    name = torch.cuda.get_device_name() if bench.cuda else platform.processor() or platform.machine()
    bench.measure_ceilings()
    failures = []
    for group in filter(None, arguments.groups.split(",")):
        try:
            GROUPS[group](bench)
        except (Exception, SystemExit) as error:
            failures.append(f"{group}: {error}")
            print(f"{group} FAILED: {error}", flush=True)
        if bench.cuda:
            torch.cuda.empty_cache()
    extras: list[tuple[str, Run]] = []
    if arguments.sweep:
        extras.append(("sweep", lambda: sweep(bench)))
    if arguments.model:
        size = arguments.model
        extras.append((size, lambda: bench_model(bench, size, arguments.samples, arguments.tokens, arguments.batch)))
    for label, run in extras:
        try:
            run()
        except (Exception, SystemExit) as error:
            failures.append(f"{label}: {error}")
            print(f"{label} FAILED: {type(error).__name__}: {error}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "implementations": {op: pkt.ops.implementation(op, arguments.device)[0] for op in pkt.ops.names()},
        "ceilings": bench.ceilings,
        "rows": bench.rows,
        "failures": failures,
    }
    path = arguments.out / f"kernels_{bench.device.type}{'_' + arguments.model if arguments.model else ''}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {path}")
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
