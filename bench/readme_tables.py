"""Write the pages' tables from bench/results/*.json (`--check`: only say whether they are what the files give)."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else None


def demo_sentences(found: dict) -> str:
    from pkt.demo.showing import sentences

    return "\n".join(f"{i}. {line}" for i, line in enumerate(sentences(found), 1))


def study_text(found: dict) -> str:
    """The demo study's verdict, what a gain is made of, and every start before and after."""
    from pkt.studying import summing, tables

    (task,) = found["tasks"]
    made, scores = tables.made_of(found), tables.task_scores(found, task, costs=False)
    assert made is not None
    trained = {name: start["trainable"] for name, start in found["tasks"][task]["starts"].items()}
    ours = trained[found["of"]]
    more = [f"{name} {count / ours:.1f} times" for name, count in trained.items() if count != ours]
    lines = [
        f"`pkt study demo` ({len(found['seeds'])} training seeds, {found['tasks'][task]['rows']} rows; "
        f"{found['made_on']['machine']['cpu']}): **{found['verdict']}**",
        *summing.warnings(found),
        "",
        tables.markdown(made),
        "",
        tables.markdown(scores),
        *([f"All train as many numbers, but for {', '.join(more)} as many."] if more else []),
    ]
    return "\n".join(lines)


def demo_table(found: dict) -> str:
    from pkt.demo.showing import ROWS, table_of

    head, rows = table_of(found)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", ROWS, "", *(f"- {line}" for line in found["verdict"])])


def bench_table(found: dict) -> str:
    lines = [
        f"On {found['threads']} CPU cores, {found['what']},",
        "against the straightforward algorithm (`bench/naive.py`), with the same windows:",
        "",
        "| stage | straightforward | pkt | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['stage']} | {r['naive_s']:.2f} s | {r['pkt_s']:.2f} s | {r['ratio']:.1f}× |" for r in found["rows"]
    ]
    sums = [r for r in found["rows"] if "naive_is" in r]
    if sums:
        lines += ["", f"The straightforward side's end to end is {sums[0]['naive_is']}: its window search ran once."]
    experts = load("experts_cpu.json")
    if experts is not None:
        ms = {row["rival"]: row["ms"] for row in experts["rows"]}
        lines += [
            "",
            f"S of a mixture ({experts['what']}) takes {ms['pkt'] / 1e3:.2f} s: {ms['pkt'] / ms['dense twin']:.2f}× its dense "
            f"twin of equal active parameters; one sample at a time {ms['one sample at a time'] / ms['pkt']:.1f}× as long "
            "(`python bench/bench_experts.py`).",
        ]
    real = load("real_cpu.json")
    if real is not None:
        lines += [
            "",
            f"SmolLM2-135M-Instruct scored on {real['seeds']} GSM8K seeds ({real['tokens']} tokens), cut to a 12-layer student and "
            f"factorized, with `--device-memory {real['device_memory']}`: {real['transfer_s']:.0f} s, of which it took "
            f"{real['transfer_peak_bytes'] / 1e6:.0f} MB (`make real`).",
        ]
    return "\n".join(lines)


def families_table(found: dict) -> str:
    lines = ["| family | S against autograd | read from disk | fed in a student of its own kind |", "|---|---|---|---|"]
    for name, row in found.items():
        fed = ", ".join(row.get("fed", ())) + "".join(f"; {note}" for note in row.get("notes", ()))
        error = "not reached" if row["error"] is None else f"{row['error']:.0e}"
        state = fed if row["passed"] else f"**fails**: {row.get('reason', 'see the test')}"
        lines.append(f"| {name} (`{row['class']}`) | {error} | {row.get('read', '')} | {state} |")
    return "\n".join(lines)


def rsvd_table(found: dict) -> str:
    lines = [
        f"On {found['threads']} CPU cores, bf16 windows with the spectrum of trained weights; energy as a share of the best known",
        "(`python bench/bench_rsvd.py --full --quality --student --layers 2`):",
        "",
        "| matrix | | ms | of pkt's time | energy |",
        "|---|---|---|---|---|",
    ]
    timed = [r for r in found["rows"] if "ms" in r]
    (full,) = (r for r in timed if "full SVD" in r["group"])
    ours = {r["group"]: r["ms"] for r in timed if r["rival"].startswith("pkt::rsvd") and "iters" not in r["rival"]}
    ours.update({r["group"]: r["ms"] for r in timed if r["rival"] == "pkt::rsvd_batch"})
    for r in timed:
        base = ours.get(r["group"], ours["4096x4096 rank 16"])
        energy = 1.0 if r is full else r["energy_of_best"]
        lines.append(f"| {r['group']} | {r['rival']} | {r['ms']:.0f} | {r['ms'] / base:.2f} | {energy:.4f} |")
    lines += [
        "",
        "Excess of the residual's square over the optimum, rank 16, for the same readings of the matrix (below zero: the right",
        "vectors are orthonormal to fp32 rounding only):",
        "",
        "| spectrum | readings | block Krylov, 16 wide | block Krylov, 32 wide | subspace iteration, 32 wide |",
        "|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        if "spectrum" in r:
            values = (r[f"excess_{k}"] for k in ("block_krylov", "block_krylov_32_wide", "subspace_iteration_32_wide"))
            readings = r["group"].removeprefix("quality, ").removesuffix(" readings")
            lines.append(f"| {r['spectrum']} | {readings} | " + " | ".join(f"{v:.1e}" for v in values) + " |")
    return "\n".join(lines)


def stream_table(found: dict) -> str:
    met = {name: "met" if good else "not met" for name, good in found["met"].items()}
    return "\n".join(
        [
            f"On {found['machine']['threads']} CPU cores ({found['machine']['cpu']}), computed in "
            f"{found['machine']['computed_in']}: "
            f"{found['what']} (`python bench/bench_stream.py`):",
            "",
            "| | measured | goal |",
            "|---|---|---|",
            f"| time | {found['seconds']:.0f} s, {found['time_ratio']:.2f}× its matrix products measured alone "
            f"({found['products_seconds']:.0f} s) | ≤ {found['goals']['time_ratio']}×: {met['time_ratio']} |",
            f"| memory, anonymous, beyond the imports | {found['peak_gb']:.2f} GB ({found['planned_gb']:.2f} planned) "
            f"| ≤ {found['goals']['peak_gb']} GB: {met['peak_gb']} |",
            f"| bytes read, of the checkpoint's | {found['read_ratio']:.2f}× | ≤ {found['goals']['read_ratio']}×: "
            f"{met['read_ratio']} |",
            f"| waiting for weights | {100 * found['waiting_share']:.1f}% of the time | |",
            f"| windows and factors | {found['windows_and_factors_seconds']:.1f} s | |",
        ]
    )


def distributed_table(found: dict) -> str:
    one, two, disk, machine = found["one"], found["two"], found["disk_to_checkpoint"], found["machine"]
    cpu = [sum(rank["cpu_seconds"] for rank in each["ranks"]) for each in (one, two)]
    met = "met" if found["met"]["efficiency"] else "not met"
    sent, through = (f"{size / 1e9:.2f} GB" for size in (found["sent_bytes"], two["loopback_bytes"]))
    return "\n".join(
        [
            f"{found['what']} ({machine['cpu']}, {machine['cores']} cores, load {two['load_average']:.1f} at the end;",
            "`python bench/bench_distributed.py`):",
            "",
            "| | one rank | two ranks | |",
            "|---|---|---|---|",
            f"| time | {one['seconds']:.0f} s | {two['seconds']:.0f} s | efficiency {found['efficiency']:.2f}, "
            f"goal {found['goal']['efficiency']}: {met} |",
            f"| CPU seconds | {cpu[0]:.0f} | {cpu[1]:.0f} | {found['efficiency_of_cpu_seconds']:.2f} |",
            f"| tensors given to torch.distributed | | {sent} | {found['sent_to_formula']:.3f} of the formula |",
            f"| through the loopback device | | {through} | {found['loopback_to_formula']:.2f} of it |",
            f"| from the disk, of the checkpoint | {disk['1']:.2f} | {disk['2']:.2f} together | |",
        ]
    )


def calculated_table(found: dict) -> str:
    taken = found["taken"]
    giga = {name: f"{value / 1e9:.0f} GB" for name, value in taken.items() if "bytes" in name or "memory" in name}
    lines = [
        f"Calculated (`python bench/bench_distributed.py --scaling`), not run: {taken['seeds']} seeds of {taken['tokens']} tokens",
        f"in bf16; {taken['flops_per_s'] / 1e12:.0f} TFLOP/s and {giga['gpu_memory']} a GPU,",
        f"{taken['gpus_a_machine']} GPUs a machine,",
        f"{giga['bytes_per_s_between_gpus']}/s between them, {giga['bytes_per_s_between_machines']}/s between machines,",
        f"{giga['bytes_per_s_from_disk']}/s from each machine's disk.",
        "",
        "| teacher | GPUs | seeds of each | a GPU holds | and sends of S | a machine reads | products | sums | reading |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        sizes = [f"{row[name] / 1e9:.0f} GB" for name in ("held_bytes", "sent_bytes", "read_bytes")]
        times = [f"{row[name] / 60:.1f} min" for name in ("products_s", "sums_s", "reading_s")]
        cells = [row["teacher"], str(row["gpus"]), str(row["seeds_of_each"]), *sizes, *times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def distil_table(found: dict) -> str:
    lines = [
        f"{found['what']} ({found['machine']['cpu']}, `python bench/bench_distil.py`). Reading the teacher costs as much as "
        f"{found['reading_epochs']:.2f} epochs.",
        "",
        "| | epochs | lr | NLL | right | general text NLL |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["arms"]:
        mean, std = row["mean"], row["std"]
        lines.append(
            f"| {row['name']} | {row['epochs']:.2f} | {row['lr']:g} | {mean['nll']:.3f} ± {std['nll']:.3f} | "
            f"{100 * mean['exact_match']:.0f}% ± {100 * std['exact_match']:.0f} | {mean['general']:.3f} ± {std['general']:.3f} |"
        )
    return "\n".join([*lines, "", *(f"- {line}" for line in found["verdict"])])


def teach_table(found: dict) -> str:
    shared = "; the machine was shared while it ran" if found["shared"] else ""
    lines = [
        f"On one CPU core ({found['machine']['cpu']}): {found['what']} (`python bench/bench_teach.py`{shared}).",
        "",
        "| | " + " | ".join(f"in {row['computed_in']}, {row['rows']} rows" for row in found["rows"]) + " | goal |",
        "|---|" + "---|" * (len(found["rows"]) + 1),
    ]
    each = {
        "CPU seconds": (lambda r: f"{r['seconds']:.1f}", ""),
        "over its matrix products alone": (
            lambda r: f"{r['time_ratio']:.2f}× of {r['products_seconds']:.1f} s",
            f"≤ {found['goals']['time_ratio']}×",
        ),
        "over the loaded model's forward pass": (
            lambda r: f"{r['forward_ratio']:.2f}× of {r['forward_seconds']:.1f} s",
            "",
        ),
        "memory, anonymous, beyond the imports": (
            lambda r: f"{r['peak_bytes'] / 1e6:.0f} MB of {r['planned_bytes'] / 1e6:.0f} planned",
            "≤ planned",
        ),
        "bytes an answer token, where all draws differ": (
            lambda r: f"{r['bytes_a_token']:.0f}",
            f"≤ {found['goals']['bytes_a_token']}",
        ),
    }
    for name, (told, goal) in each.items():
        lines.append(f"| {name} | " + " | ".join(told(row) for row in found["rows"]) + f" | {goal} |")
    demo = ", ".join(f"the demo's {name} {value:.1f}" for name, value in found["demo_bytes_a_token"].items())
    return "\n".join([*lines, "", f"Bytes an answer token of trained models: {demo}."])


def kernels_table(found: dict) -> str:
    lines = [f"| op, fp32, {found['threads']} cores | | ms | of pkt's time |", "|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {r['group']} | {r['rival']} | {r['ms']:.1f} | {r['ours_is_faster_by']:.2f} |"
            for r in found["rows"]
            if "failed" not in r
        ]
    )


def gpu_name(found: dict) -> str:
    return f"{found['device']} (torch {found['torch']}, Triton {found['machine']['triton']})"


def gpu_table(found: dict) -> str:
    """End to end on a GPU."""
    lines = [
        f"On one {gpu_name(found)}, `bench/gpu.sh`: a teacher's shapes with random bf16 weights,",
        f"{found['rows'][0]['tokens']:,} tokens of 32 seeds, rank {found['rank']}, after loading:",
        "",
        "| teacher | time | at the rate of its matrix products alone | device memory at the peak | waiting for weights |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" + (
            f", {row['weights_bytes'] / 1e9:.0f} of them weights" if row["resident"] else ""
        )
        lines.append(
            f"| {row['row']} | {row['seconds']:.1f} s | {row['predicted_seconds']:.1f} s | {memory} | {row['waiting_share']:.0%} |"
        )
    return "\n".join(lines)


def gpu_goals(found: dict) -> str:
    """Each goal of the design on a GPU, and what was found."""
    import goals

    lines = [
        f"{gpu_name(found)}; a copy of {found['ceilings']['copy_gbs']:.0f} GB/s and a cuBLAS product of "
        f"{found['ceilings']['product_tflops']:.0f} TFLOP/s in the same run.",
        "",
        "| what | goal | found | |",
        "|---|---|---|---|",
    ]
    words = {True: "met", False: "**not met**", None: ""}
    files = goals.Files(RESULTS, "cuda")
    for line in (line for made in goals.GOALS["cuda"] for line in made(files)):
        lines.append(f"| {line.what} | {line.goal} | {line.found} | {words[line.met]} |")
    return "\n".join(lines)


def gpu_kernels(found: dict) -> str:
    lines = ["| op, bf16 | | ms | of pkt's time | rate | of the ceiling |", "|---|---|---|---|---|---|"]
    for r in (r for r in found["rows"] if "failed" not in r):
        rate = f"{r['tflops']:.0f} TFLOP/s" if "tflops" in r else f"{r['gbs']:.0f} GB/s" if "gbs" in r else ""
        share = next((f"{r[name]:.0%}" for name in ("of_product", "of_copy") if name in r), "")
        lines.append(
            f"| {r['group']} | {r['rival']} | {r['ms']:.3f} | {r['ours_is_faster_by']:.2f} | {rate} | {share} |"
        )
    return "\n".join(lines)


def gpu_rsvd(found: dict) -> str:
    lines = [
        f"{gpu_name(found)}; energy as a share of the best known:",
        "",
        "| matrix | | ms | of pkt's time | energy |",
        "|---|---|---|---|---|",
    ]
    for r in (r for r in found["rows"] if "energy_of_best" in r):
        lines.append(
            f"| {r['group']} | {r['rival']} | {r['ms']:.2f} | {r['ours_is_faster_by']:.2f} | {r['energy_of_best']:.4f} |"
        )
    return "\n".join(lines)


def gpu_profile(found: dict) -> str:
    """A profiled transfer: how long the device was busy, and with what."""
    work = next(row for row in found["rows"] if row["work"].startswith("transfer"))
    waits = sum(each["calls"] for name, each in work["host"].items() if name == "cudaStreamSynchronize")
    lines = [
        f"{gpu_name(found)}, {work['work']} (`python bench/profile_gpu.py`): {work['seconds']:.2f} s, of which the device is busy",
        f"{work['busy_seconds']:.2f} s, with {work['launches']:,} launches and {waits} waits. The longest:",
        "",
        "| kernel | launches | ms |",
        "|---|---|---|",
    ]
    for row in work["kernels"][:16]:
        name = row["kernel"].replace("at::native::", "").replace("(anonymous namespace)::", "").replace("|", "/")
        lines.append(f"| `{name.removeprefix('void ')[:90]}` | {row['calls']} | {row['ms']:.1f} |")
    return "\n".join(lines)


def descendant_text(found: dict) -> str:
    """A real pair: what was made, and the transplant beside what it is held against."""
    student, teacher, asked, machine = found["student"], found["teacher"], found["options"], found["machine"]
    seeds = max(len(row["after"]["task"]) for row in found["rows"])
    again = ", ".join(f"{name} {count}" for name, count in found["lineage"]["found again"].items())
    text = (
        f"{student['general before healing']:.2f} once cut, {student['general']:.2f} healed on only "
        f"{student['healed on tokens']:,} tokens, {found['base']['general']:.2f} the whole model's"
    )
    rates = "all at one rate" if len(asked["rates"]) == 1 else "each at its own rate"
    tuned = f"from {teacher['base task']:.2f} to {teacher['task']:.2f} on {asked['test_rows']} rows held out"
    lines = [
        f"`python examples/descendant.py --gsm8k ROWS.jsonl`, {found['what']}; {machine['cpu']}, {found['threads']} thread(s).",
        "",
        f"- Student: {student['parameters'] / 1e6:.0f} M parameters, {student['shape']}. NLL of general text {text}.",
        f"- Teacher: the whole model, tuned on {teacher['rows']} rows: NLL {tuned}.",
        f"- `pkt lineage`: *{found['lineage']['verdict']}*; found again from the healed weights alone: {again}.",
        f"- Transplant: α = {found['transplant']['alpha']:g}, rank {asked['rank']}. Then each method learns from "
        f"{asked['train_rows']} of the teacher's rows, {rates}, {seeds} seed(s).",
        "",
        "| | lr | NLL before training | NLL after | general text before | after |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [row["method"], f"{row['lr']:g}"]
        for figure in ("task", "general"):
            mean = sum(row["after"][figure]) / len(row["after"][figure])
            cells += [f"{row['before'][figure]:.3f}", f"{mean:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [""] if found["comparisons"] else []
    for c in found["comparisons"]:
        apart = "" if c["adjusted"] < 0.05 else ", which may be chance"
        what = "NLL" if c["figure"] == "task" else "general text"
        lines.append(f"- {c['a']} against {c['b']}: {what} {c['mean']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]{apart}")
    return "\n".join(lines)


def chain_table(found: dict) -> str:
    steps, told = found["steps"], found["told"]
    lines = [
        f"{found['seconds']:.0f} seconds in all ({found['machine']['cpu']}, {found['machine']['cores']} cores).",
        f"{steps['heal']} steps of healing and {steps['tune']} of tuning, 32 rows each, then {found['rows']} problems.",
        "",
        f"- Small: {told['shape']}.",
        f"- `pkt lineage` of the tuned teacher and the healed model: {told['lineage']}.",
        f"- Transplant: {told['transplant']}.",
        "",
        "| | task NLL | right | general text NLL |",
        "|---|---|---|---|",
    ]
    for name, row in found["table"].items():
        lines.append(f"| {name} | {row['nll']:.3f} | {100 * row['exact_match']:.0f}% | {row['general']:.3f} |")
    return "\n".join([*lines, "", "One seed, so no difference here has an interval; the demo's have."])


def shrink_table(found: dict) -> str:
    lines = [
        f"`python bench/bench_shrink.py`: the demo's base ({found['teacher']['parameters']:,} parameters, NLL of general text "
        f"{found['teacher']['nll']:.3f}) cut to {found['shape']}, and healed on {found['healed_tokens']:,} tokens of general text, "
        f"{found['seeds']} seed(s) of healing (mean, and ± half the range):",
        "",
        "| units chosen by | parameters | NLL once cut | perplexity | NLL healed | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        (cut, _), (healed, half) = (
            (sum(each) / len(each), (max(each) - min(each)) / 2) for each in (row["cuts"], row["healed"])
        )
        lines.append(
            f"| {row['score']} | {row['parameters']:,} | {cut:.3f} | {math.exp(cut):.1f} | "
            f"{healed:.3f} ± {half:.3f} | {math.exp(healed):.2f} |"
        )
    return "\n".join(lines)


def real_shrink_table(found: dict) -> str:
    teacher = found["teacher"]
    whole = f"{teacher['parameters']:,} parameters, {teacher['shape']}"
    lines = [
        f"`python bench/bench_shrink_real.py --text ROWS.jsonl`, {found['machine']['cpu']}, {found['threads']} thread(s): "
        f"SmolLM2-135M-Instruct ({whole}; perplexity {math.exp(teacher['nll']):.1f} on {found['rows_measured']} paragraphs that "
        f"heal nothing) cut to {found['shape']}, and healed on {found['rows_healed']} paragraphs of general text "
        f"({found['rows'][0]['tokens']:,} tokens, {found['steps']} steps at {found['lr']:g}); one seed.",
        "",
        "| units chosen by | parameters | NLL once cut | perplexity | NLL healed | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [f"{x:.2f} | {math.exp(x):,.0f}" for x in (row["cut"], row["healed"])]
        lines.append(f"| {row['score']} | {row['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quick_table(found: dict) -> str:
    """The study's preset on real text: what the pair is, every start, and what each difference says."""
    pair, asked, stats, of = found["pair"], found["options"], found["stats"], found["stats"]["of"]
    minutes = {what: f"{seconds / 60:.0f}" for what, seconds in found["seconds"].items()}
    sizes = {name: f"{pair[name]['parameters'] / 1e6:.0f} M parameters" for name in ("base", "student")}
    nll = {name: f"{pair[name]['general']:.2f}" for name in ("base", "teacher", "small", "student")}
    lines = [
        f"`python bench/bench_quick.py --data DIR --work DIR`: {found['what']}; {found['machine']['cpu']}, {found['threads']} "
        f"thread(s) of a shared machine, {minutes['pair']} minutes for the pair and {minutes['study']} for the study.",
        "",
        f"- Teacher: {sizes['base']}, tuned on {pair['rows the teacher learnt from']} rows of both tasks. NLL of general text "
        f"{nll['base']} before, {nll['teacher']} after.",
        f"- Student: {sizes['student']}, {asked['layers']} layers of {asked['hidden']} units, cut out by `pkt shrink` "
        f"(NLL {nll['small']}), healed on {pair['texts the student was healed on']:,} texts ({nll['student']}).",
        f"- {asked['rows']} rows learnt from, {asked['held_out']} that choose the rates, {asked['test_rows']} tested, "
        f"{len(stats['seeds'])} seeds.",
    ]
    for task, value in stats["tasks"].items():
        told = {c["control"]: c for c in stats["comparisons"] if (c["family"], c["task"]) == ("deciding", task)}
        lines += [
            "",
            f"| {task} | lr | further steps | NLL before | after | general text before | after | {of} minus it |",
            "|---" * 8 + "|",
        ]
        for name, model in value["untrained"].items():
            lines.append(
                f"| *untrained {name}* | | | | {model['test']['nll']:.3f} | | {model['general']['nll']:.3f} | |"
            )
        lines += [_quick_row(name, start, told.get(name)) for name, start in value["starts"].items()]
    lines += ["", f"Verdict: *{stats['verdict']}*"]
    for c in found["off_task"]:
        apart = "" if c["adjusted"] < 0.05 else ", which may be chance"
        interval = f"{c['mean']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]"
        lines.append(f"The window on {c['task']}'s own seeds minus the window on the other task's: {interval}{apart}.")
    return "\n".join(lines)


def _quick_row(name: str, start: dict, told: dict | None) -> str:
    def mean(test: str) -> str:
        values = [run[test]["nll"] for run in start["after"]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{sum(values) / len(values):.3f} ± {spread:.3f}"

    chosen = f"{start['chosen']['lr']:g}" + ("\\*" if start["at_the_end"] else "")
    steps = f"{start['extra_steps']:+.0%}" if start["extra_steps"] else ""
    said = "" if told is None else f"{told['mean']:+.3f} [{told['low']:+.3f}, {told['high']:+.3f}] {told['word']}"
    before = [f"{start['before'][test]['nll']:.3f}" for test in ("test", "general")]
    cells = [name, chosen, steps, before[0], mean("test"), before[1], mean("general"), said]
    return "| " + " | ".join(cells) + " |"


# Page -> table -> the file its figures come from, and how they are laid out.
PAGES = {
    "README.md": {
        "study": ("study_demo.json", study_text),
        "demo sentences": ("demo_cpu.json", demo_sentences),
        "bench table": ("end_to_end_cpu.json", bench_table),
        "gpu table": ("stream_cuda.json", gpu_table),
    },
    "docs/models.md": {"families": ("families.json", families_table)},
    "csrc/README.md": {
        "gpu rsvd": ("rsvd_cuda.json", gpu_rsvd),
        "rsvd table": ("rsvd_cpu.json", rsvd_table),
    },
    "docs/lineage.md": {
        "demo table": ("demo_cpu.json", demo_table),
        "shrink table": ("shrink_cpu.json", shrink_table),
        "real shrink table": ("shrink_real_cpu.json", real_shrink_table),
        "chain table": ("chain_cpu.json", chain_table),
        "descendant": ("descendant_cpu.json", descendant_text),
    },
    "docs/distil.md": {
        "distil table": ("distil_cpu.json", distil_table),
        "teach table": ("teach_cpu.json", teach_table),
    },
    "docs/scaling.md": {
        "stream table": ("stream_cpu.json", stream_table),
        "ranks table": ("distributed_cpu.json", distributed_table),
        "calculated table": ("distributed_scaling.json", calculated_table),
    },
    "docs/study.md": {"quick": ("quick_cpu.json", quick_table)},
    "kernels/README.md": {
        "gpu goals": ("kernels_cuda.json", gpu_goals),
        "gpu kernels": ("kernels_cuda.json", gpu_kernels),
        "gpu profile": ("profile_cuda.json", gpu_profile),
        "cpu table": ("kernels_cpu.json", kernels_table),
    },
}


def main() -> int:
    stale = []
    for page, tables in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        new = text
        for name, (file, table) in tables.items():
            found = load(file)
            lines = "(no run is committed yet)" if found is None else table(found)
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
            new, count = re.subn(pattern, lambda m, t=lines: f"{m[1]}{t}\n{m[2]}", new, flags=re.S)
            if count != 1:
                raise SystemExit(f"{page} has {count} places for the {name}; it must have one")
        if new != text:
            stale.append(page)
            if "--check" not in sys.argv:
                (ROOT / page).write_text(new, encoding="utf-8")
    if "--check" not in sys.argv:
        return 0
    for page in stale:
        print(f"{page}'s tables are not what bench/results gives; run python bench/readme_tables.py")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
