"""Hostile input and what it gets: every row of docs/hostile.md, tried. `python tests/test_hostile.py` writes the page anew."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "hostile.md"
HEAD = """# Hostile input, and what it gets

Files, rows and options that are damaged, absurd or meant to do harm. Each row below is a test (tests/test_hostile.py writes this
page): the command ends with exit code 1 and one message of at most ten lines that says what is wrong, where, and what to do;
no code of the input runs, nothing outside its folder is opened, and nothing half-written is left. `...` stands for paths and
numbers.

"""


@dataclass(frozen=True)
class Place:
    """Copies of what a command needs, to be spoilt."""

    folder: Path
    teacher: Path
    student: Path
    seeds: Path
    extraction: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def transfer(self, *options: Any) -> list[Any]:
        return ["transfer", self.teacher, self.student, self.seeds, "--out", self.out, "--rank", 4, *options]

    def config(self, **settings: Any) -> None:
        file = self.teacher / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    def weights(self, header: dict[str, Any] | bytes, data: bytes) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (self.teacher / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    def rows(self, *rows: Any) -> None:
        self.seeds.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")

    def template(self, text: str) -> None:
        (self.teacher / "chat_template.jinja").write_text(text)
        chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        self.rows({"messages": chat})


Spoil = Callable[[Place], "list[Any] | None"]  # the command; None: a transfer
CASES: dict[str, list[tuple[str, str, Spoil]]] = {}  # part of the page -> (what, gist of the message, how)


def case(part: str, what: str, gist: str) -> Callable[[Spoil], Spoil]:
    def add(spoil: Spoil) -> Spoil:
        CASES.setdefault(part, []).append((what, gist, spoil))
        return spoil

    return add


# --- checkpoints ------------------------------------------------------------------------------------------------------

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
CHECKPOINTS = "Checkpoints"


@case(CHECKPOINTS, "weights cut off in the middle", "model.safetensors is truncated: ... bytes of ...")
def _(place: Place) -> None:
    file = place.teacher / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@case(CHECKPOINTS, "bytes after the last tensor", "model.safetensors goes on for 4 bytes after its last tensor")
def _(place: Place) -> None:
    with open(place.teacher / "model.safetensors", "ab") as file:
        file.write(b"more")


@case(CHECKPOINTS, "a text in place of the weights", "model.safetensors is truncated or not a safetensors file")
def _(place: Place) -> None:
    (place.teacher / "model.safetensors").write_bytes(b"not a checkpoint at all")


@case(CHECKPOINTS, "two tensors over the same bytes", "model.safetensors is not a sound safetensors file")
def _(place: Place) -> None:
    place.weights({"a": ONE, "b": ONE}, b"\0" * 4)


@case(CHECKPOINTS, "negative offsets", "model.safetensors is not a sound safetensors file")
def _(place: Place) -> None:
    place.weights({"a": {**ONE, "data_offsets": [-4, 0]}}, b"\0" * 4)


@case(CHECKPOINTS, "a name twice in the header", "model.safetensors is not a sound safetensors file")
def _(place: Place) -> None:
    one = json.dumps(ONE).encode()
    place.weights(b'{"a":%s,"a":%s}' % (one, one), b"\0" * 4)


@case(CHECKPOINTS, "a header of 100 000 brackets", "model.safetensors is not a sound safetensors file")
def _(place: Place) -> None:
    place.weights(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")


@case(
    CHECKPOINTS,
    "an index that names `../secret.safetensors`",
    "names '../secret.safetensors', which is not in its folder",
)
def _(place: Place) -> None:
    shutil.move(place.teacher / "model.safetensors", place.folder / "secret.safetensors")
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (place.teacher / "model.safetensors.index.json").write_text(json.dumps(index))


@case(CHECKPOINTS, "weights that are a link out of the folder", "is a link out of its folder")
def _(place: Place) -> None:
    shutil.move(place.teacher / "model.safetensors", place.folder / "secret.safetensors")
    (place.teacher / "model.safetensors").symlink_to(place.folder / "secret.safetensors")


@case(CHECKPOINTS, "a pickle that runs code when loaded", "pytorch_model.bin is a pickle that cannot be loaded safely")
def _(place: Place) -> None:
    import os

    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(place.folder / "was-here"),)

    (place.teacher / "model.safetensors").unlink()
    torch.save({"x": Evil()}, place.teacher / "pytorch_model.bin")


@case(
    CHECKPOINTS,
    "code of its own (`auto_map`)",
    "it needs code of its own (auto_map in its config.json), which pkt never runs",
)
def _(place: Place) -> None:
    (place.teacher / "evil.py").write_text(f"open({str(place.folder / 'was-here')!r}, 'w')\n")
    place.config(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})


@case(CHECKPOINTS, "a weight that is NaN", "parameter model.layers.1.mlp.up_proj.weight itself holds NaN")
def _(place: Place) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(place.teacher / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, place.teacher / "model.safetensors", {"format": "pt"})


# --- configurations ---------------------------------------------------------------------------------------------------

CONFIGURATIONS = "Configurations"


@case(CONFIGURATIONS, "10⁹ layers", "num_hidden_layers is 1e+09, and no model has more than 2000")
def _(place: Place) -> None:
    place.config(num_hidden_layers=10**9)


@case(CONFIGURATIONS, "a vocabulary of 10¹² tokens", "vocab_size is 1e+12, and no model has more than 2e+07")
def _(place: Place) -> None:
    place.config(vocab_size=10**12)


@case(CONFIGURATIONS, "10⁹ experts", "num_local_experts is 1e+09, and no model has more than 20000")
def _(place: Place) -> None:
    place.config(num_local_experts=10**9)


@case(
    CONFIGURATIONS,
    "an activation that is none (`hidden_act`)",
    "no model can be built from this config.json (KeyError: ...sillu",
)
def _(place: Place) -> None:
    place.config(hidden_act="sillu")


@case(CONFIGURATIONS, "100 000 brackets", "config.json: not JSON that can be read")
def _(place: Place) -> None:
    (place.teacher / "config.json").write_text("[" * 100_000 + "]" * 100_000)


@case(CONFIGURATIONS, "a list in place of an object", "config.json is not a model's configuration")
def _(place: Place) -> None:
    (place.teacher / "config.json").write_text("[1]")


# --- rows and templates -----------------------------------------------------------------------------------------------

ROWS = "Rows and chat templates"


@case(ROWS, "a row that is no JSON", "seeds.jsonl:2: not valid JSON")
def _(place: Place) -> None:
    place.rows({"text": "one two"}, "{oops")


@case(ROWS, "a row of 100 000 brackets", "seeds.jsonl:1: nested too deeply")
def _(place: Place) -> None:
    place.rows("[" * 100_000)


@case(ROWS, "bytes that are no UTF-8", "seeds.jsonl:1: not UTF-8 text")
def _(place: Place) -> None:
    place.seeds.write_bytes(b'{"text": "\xff\xfe"}\n')


@case(ROWS, "half of a surrogate pair", "seeds.jsonl:1: not text: half of a surrogate pair")
def _(place: Place) -> None:
    place.rows('{"text": "one \\ud800 two"}')


@case(ROWS, "a number of 5000 digits", "seeds.jsonl:1: not JSON that can be read")
def _(place: Place) -> None:
    place.rows('{"text": ' + "1" * 5000 + "}")


@case(ROWS, "an empty file", "seeds.jsonl has no rows")
def _(place: Place) -> None:
    place.seeds.write_text("\n \n")


@case(ROWS, "a template that never ends", "seeds.jsonl:1: the chat template takes more than 1 s for this row")
def _(place: Place) -> None:
    loop = "{% for a in range(99999) %}"
    place.template(loop * 3 + "{% endfor %}" * 3)


@case(ROWS, "a template of 10¹⁰ characters", "seeds.jsonl:1: the chat template makes more text than memory allows")
def _(place: Place) -> None:
    place.template("{{ 'x' * 10**10 }}")


@case(
    ROWS,
    "a template that reaches for Python's insides",
    "seeds.jsonl:1: the tokenizer's chat template refuses this row",
)
def _(place: Place) -> None:
    place.template("{{ ''.__class__.__mro__[1].__subclasses__() }}")


@case(ROWS, "a token that the model does not have", "seeds.jsonl:1: token id ... does not exist in ... (... tokens)")
def _(place: Place) -> None:
    from pkt.models import load_tokenizer

    tokenizer = load_tokenizer(place.teacher)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    tokenizer.save_pretrained(place.teacher)
    place.rows({"text": "a <picture> b"})


@case(
    ROWS,
    "a row longer than a model's table of positions",
    "seeds.jsonl:1: the row has ... tokens, and ... only 64 positions",
)
def _(place: Place) -> list[Any]:
    import zoo
    from conftest import save

    from pkt.models import load_tokenizer

    tokenizer = load_tokenizer(place.teacher)
    folder = save(zoo.gpt2(vocab=len(tokenizer)), place.folder / "gpt2", tokenizer)
    place.rows({"text": "1 " * 200})
    return ["sensitivity", folder, place.seeds, "--out", place.out]


# --- results of pkt's own ---------------------------------------------------------------------------------------------

RESULTS = "Results of pkt's own, changed"


@case(RESULTS, "scores with a NaN", "the scores of ... are not all finite and positive")
def _(place: Place) -> list[Any]:
    import torch
    from safetensors.torch import save_file

    meta = {"format": "pkt-sensitivity-1", "tile": None, "layers": None, "losses": [], "shapes": {}, "provenance": {}}
    save_file({"a": torch.tensor([float("nan")])}, place.folder / "s.safetensors", {"pkt": json.dumps(meta)})
    return ["plan", place.folder / "s.safetensors", place.teacher, place.student]


@case(RESULTS, "a plan in place of scores", "is truncated or not a safetensors file")
def _(place: Place) -> list[Any]:
    (place.folder / "plan.json").write_text('{"format": "pkt-plan-2", "entries": []}')
    return ["plan", place.folder / "plan.json", place.teacher, place.student]


def edited_plan(place: Place, change: Callable[[list[dict[str, Any]]], None]) -> list[Any]:
    """The command that extracts a plan with changed entries."""
    plan = json.loads((place.extraction / "pkt.json").read_text())["plan"]
    plan["student"]["name"] = str(place.student)
    change(plan["entries"])
    (place.folder / "plan.json").write_text(json.dumps(plan))
    return ["extract", place.teacher, place.folder / "plan.json", "--out", place.out, "--rank", 4]


@case(RESULTS, "a plan with a region outside of its matrix", "this plan cannot be extracted: ... does not lie in it")
def _(place: Place) -> list[Any]:
    return edited_plan(place, lambda entries: entries[3]["region"].update(rows=[[1000, 1032]]))


@case(
    RESULTS,
    "a plan with a region that begins before its matrix",
    "this plan cannot be extracted: ... does not lie in it",
)
def _(place: Place) -> list[Any]:
    return edited_plan(place, lambda entries: entries[3]["region"].update(cols=[[-8, 24]]))


@case(RESULTS, "a plan for a matrix that the student does not have", "this plan does not fit ... has no such matrix")
def _(place: Place) -> list[Any]:
    return edited_plan(place, lambda entries: entries[3].update(target="model.layers.9.self_attn.q_proj"))


@case(RESULTS, "a plan for a matrix of another shape", "this plan does not fit ... the plan has [")
def _(place: Place) -> list[Any]:
    def shrink(entries: list[dict[str, Any]]) -> None:
        (a, b), *_ = entries[3]["region"]["rows"]
        rows, cols = entries[3]["region"]["shape"]
        entries[3]["region"].update(rows=[[a, b - 1]], shape=[rows - 1, cols])

    return edited_plan(place, shrink)


@case(RESULTS, "a plan for a student that has become another", "the plan was made from another model")
def _(place: Place) -> list[Any]:
    file = place.student / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 1}))
    return edited_plan(place, lambda entries: None)


@case(RESULTS, "a plan of another teacher", "the plan was made from another model")
def _(place: Place) -> list[Any]:
    command = edited_plan(place, lambda entries: None)
    return [command[0], place.student, *command[2:]]


@case(RESULTS, "a plan with a word for a region", "plan.json is incomplete")
def _(place: Place) -> list[Any]:
    return edited_plan(place, lambda entries: entries[3].update(region="x"))


@case(RESULTS, "a plan with a list in place of its student", "plan.json is incomplete")
def _(place: Place) -> list[Any]:
    command = edited_plan(place, lambda entries: None)
    plan = json.loads(command[2].read_text())
    command[2].write_text(json.dumps({**plan, "student": []}))
    return command


@case(RESULTS, "a plan without regions", "this plan cannot be extracted: ... it has no regions")
def _(place: Place) -> list[Any]:
    return edited_plan(place, list.clear)


@case(RESULTS, "a training checkpoint whose optimizer runs code", "cannot be loaded safely; remove that folder")
def _(place: Place) -> list[Any]:
    import os

    import torch
    from commands import run

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(place.folder / "was-here"),)

    out = place.folder / "run"
    options = ["--out", out, "--max-steps", 2, "--save-steps", 1, "--batch-size", 1]
    command = ["train", place.student, place.extraction, place.seeds, *options]
    run(*command)
    manifest = json.loads((out / "pkt.json").read_text())
    (out / "pkt.json").write_text(json.dumps({**manifest, "finished": False}))
    shutil.rmtree(out / "checkpoint-2")
    torch.save({"x": Evil()}, out / "checkpoint-1" / "optimizer.pt")
    return command


@case(RESULTS, "a pkt.json of 100 000 brackets", "pkt.json: not JSON that can be read")
def _(place: Place) -> list[Any]:
    (place.extraction / "pkt.json").write_text("[" * 100_000)
    return ["inspect", place.extraction]


@case(RESULTS, "a pkt.json that is a list", "pkt.json is not a manifest of pkt's")
def _(place: Place) -> list[Any]:
    (place.extraction / "pkt.json").write_text("[1]")
    return ["train", place.student, place.extraction, place.seeds, "--out", place.out]


@case(RESULTS, "an extraction without a part of its weights", "pkt.json and the weights list different modules")
def _(place: Place) -> list[Any]:
    from safetensors.torch import load_file, save_file

    file = place.extraction / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(iter(tensors)).partition(".lora_")[0]
    save_file({n: t for n, t in tensors.items() if not n.startswith(gone)}, file, {"format": "pt"})
    return ["inject", place.student, place.extraction, "--out", place.out]


# --- adapters and lineages --------------------------------------------------------------------------------------------

ADAPTERS = "Adapters and lineages"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}


def adapter(place: Place, a: Any, b: Any, **config: Any) -> Path:
    """A LoRA folder of the first q_proj with these factors."""
    from safetensors.torch import save_file

    folder, name = place.folder / "adapter", "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    folder.mkdir()
    save_file({f"{name}A.weight": a, f"{name}B.weight": b}, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
    return folder


def evaluated(place: Place, folder: Path) -> list[Any]:
    return ["evaluate", place.student, place.seeds, "--adapter", folder]


@case(ADAPTERS, "factors that multiply to no matrix", "the LoRA factors of ... are [4, 32] and [32, 3]")
def _(place: Place) -> list[Any]:
    import torch

    return evaluated(place, adapter(place, torch.ones(4, 32), torch.ones(32, 3)))


@case(ADAPTERS, "`pkt inspect` of factors that are numbers", "the LoRA factors of ... are [] and []")
def _(place: Place) -> list[Any]:
    import torch

    return ["inspect", adapter(place, torch.tensor(1.0), torch.tensor(1.0))]


@case(ADAPTERS, "factors of whole numbers", "the LoRA factors of ... (torch.int64), which multiply to no matrix")
def _(place: Place) -> list[Any]:
    import torch

    whole = torch.ones(4, 32, dtype=torch.int64)
    return evaluated(place, adapter(place, whole, whole.t().contiguous()))


@case(ADAPTERS, "a lora_alpha that is NaN", "gives ... no scale (lora_alpha is nan)")
def _(place: Place) -> list[Any]:
    import torch

    return evaluated(place, adapter(place, torch.ones(4, 32), torch.ones(32, 4), lora_alpha=float("nan")))


@case(ADAPTERS, "a lora_alpha that is a word", "gives ... no scale (lora_alpha is 16)")
def _(place: Place) -> list[Any]:
    import torch

    return evaluated(place, adapter(place, torch.ones(4, 32), torch.ones(32, 4), lora_alpha="16"))


@case(ADAPTERS, "a configuration of another rank", "has factors of rank 4, and its adapter_config.json says 8")
def _(place: Place) -> list[Any]:
    import torch

    return evaluated(place, adapter(place, torch.ones(4, 32), torch.ones(32, 4), r=8))


@case(ADAPTERS, "`pkt train` at a rank of 10⁵", "rank=100000 is above the smaller side of every matrix adapted")
def _(place: Place) -> list[Any]:
    return ["train", place.student, place.seeds, "--out", place.out, "--rank", 10**5]


@case(ADAPTERS, "an end token that is a word", "generation_config.json has 'x' for an eos_token_id")
def _(place: Place) -> list[Any]:
    (place.student / "generation_config.json").write_text('{"eos_token_id": "x"}')
    return ["evaluate", place.student, place.seeds, "--exact-match"]


@case(ADAPTERS, "an alpha_pattern that is no regular expression", "gives ... no scale")
def _(place: Place) -> list[Any]:
    import torch

    return evaluated(place, adapter(place, torch.ones(4, 32), torch.ones(32, 4), alpha_pattern={"(": 8}))


@case(
    ADAPTERS,
    "target_parameters that are a number",
    "the target_parameters of its adapter_config.json are no list of names",
)
def _(place: Place) -> list[Any]:
    import torch

    return evaluated(place, adapter(place, torch.ones(4, 32), torch.ones(32, 4), target_parameters=7))


@case(ADAPTERS, "a pickled adapter that is a list", "adapter_model.bin does not hold an adapter's tensors by name")
def _(place: Place) -> list[Any]:
    import torch

    folder = adapter(place, torch.ones(4, 32), torch.ones(32, 4))
    (folder / "adapter_model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "adapter_model.bin")
    return evaluated(place, folder)


@case(ADAPTERS, "`pkt import` of factors that are numbers", "the LoRA factors of ... are [] and []")
def _(place: Place) -> list[Any]:
    import torch

    folder = adapter(place, torch.tensor(1.0), torch.tensor(1.0))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    torch.save(
        {f"{name}A.weight": torch.tensor(1.0), f"{name}B.weight": torch.tensor(1.0)}, folder / "adapter_model.bin"
    )
    return ["import", folder, "--out", place.out, "--student", place.student]


@case(ADAPTERS, "`pkt lineage` of weights with a NaN", "teacher: ... holds NaN or Inf; the checkpoint is damaged")
def _(place: Place) -> list[Any]:
    from safetensors.torch import load_file, save_file

    file = place.teacher / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return ["lineage", place.teacher, place.student]


@case(ADAPTERS, "a lineage of units that are not there", "the lineage names units that the two models do not have")
def _(place: Place) -> list[Any]:
    from commands import run

    file = place.folder / "lineage.json"
    run("lineage", place.teacher, place.student, "--out", file)
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "hidden": [10**6, *found["hidden"][1:]]}))
    return ["transplant", place.teacher, place.student, place.seeds, "--lineage", file, "--anyway", "--out", place.out]


@case(ADAPTERS, "a lineage without its models", "lineage.json is incomplete")
def _(place: Place) -> list[Any]:
    from commands import run

    file = place.folder / "lineage.json"
    run("lineage", place.teacher, place.student, "--out", file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "teacher": 3}))
    return ["transplant", place.teacher, place.student, place.seeds, "--lineage", file, "--anyway", "--out", place.out]


@case(ADAPTERS, "`pkt import --trained-from` the folder itself", "cannot have been trained from itself")
def _(place: Place) -> list[Any]:
    import torch

    folder = adapter(place, torch.ones(4, 32), torch.ones(32, 4))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    torch.save(
        {f"{name}A.weight": torch.ones(4, 32), f"{name}B.weight": torch.ones(32, 4)}, folder / "adapter_model.bin"
    )
    return ["import", folder, "--out", place.out, "--student", place.student, "--trained-from", folder]


@case(ADAPTERS, "`pkt start --how eva` of weights with an Inf", "the inputs of ... on the seeds are not finite")
def _(place: Place) -> list[Any]:
    from safetensors.torch import load_file, save_file

    file = place.student / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.v_proj.weight"].view(-1)[3] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    return ["start", place.student, place.seeds, "--how", "eva", "--out", place.out]


# --- outputs and options ----------------------------------------------------------------------------------------------

OPTIONS = "Outputs and options"


@case(OPTIONS, "`--out` in a folder of somebody's own", "holds something that pkt did not write")
def _(place: Place) -> list[Any]:
    mine = place.folder / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    return [*place.transfer()[:4], "--out", mine, "--force"]


@case(OPTIONS, "`pkt plan --out` on the teacher's weights", "holds something else than this command writes")
def _(place: Place) -> list[Any]:
    scores = place.folder / "none.safetensors"
    return ["plan", scores, place.teacher, place.student, "--out", place.teacher / "model.safetensors", "--force"]


@case(OPTIONS, "`--map` of a name that is not there", "module_map (--map) names b.*.up, no matrix of the student's")
def _(place: Place) -> list[Any]:
    return place.transfer("--map", "a.*.up=b.*.up")


@case(OPTIONS, "a rank above a matrix's side", "rank 400 is above the smaller side of ... matrices")
def _(place: Place) -> list[Any]:
    return [*place.transfer()[:-2], "--rank", 400]


@case(OPTIONS, "`--energy` and `--rank` together", "--energy finds each rank, so that --rank has no part in it")
def _(place: Place) -> list[Any]:
    return place.transfer("--energy", 0.9)


@case(OPTIONS, "a student deeper than its teacher", "the teacher has 2 layers, fewer than the student's 4")
def _(place: Place) -> list[Any]:
    return ["transfer", place.student, place.teacher, place.seeds, "--out", place.out]


# ----------------------------------------------------------------------------------------------------------------------


def page() -> str:
    parts = []
    for part, cases in CASES.items():
        lines = [f"| {what} | {gist.strip()} |" for what, gist, _ in cases]
        parts.append("\n".join([f"## {part}", "", "| input | message |", "|---|---|", *lines]))
    return HEAD + "\n\n".join(parts) + "\n"


@pytest.fixture
def place(teacher_dir: Path, student_dir: Path, extraction_dir: Path, seed_file: Path, tmp_path: Path) -> Place:
    for source, name in ((teacher_dir, "teacher"), (student_dir, "student"), (extraction_dir, "extraction")):
        shutil.copytree(source, tmp_path / name)
    shutil.copy(seed_file, tmp_path / "seeds.jsonl")
    return Place(tmp_path, *(tmp_path / name for name in ("teacher", "student", "seeds.jsonl", "extraction")))


@pytest.mark.parametrize(
    ("gist", "spoil"),
    [pytest.param(gist, spoil, id=f"{part}: {what}") for part, cases in CASES.items() for what, gist, spoil in cases],
)
def test_what_it_gets(gist: str, spoil: Spoil, place: Place) -> None:
    from commands import empty_beside, fails

    command = spoil(place) or place.transfer()
    begin = time.process_time()
    said = fails(*command)
    assert time.process_time() - begin < 5
    assert re.search(".*".join(re.escape(part.strip()) for part in gist.split("...")), said, re.S), said
    assert len(said.splitlines()) <= 10
    assert empty_beside(place.out)
    assert not (place.folder / "was-here").exists()


def test_the_page_tells_what_was_tried() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/test_hostile.py writes it"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
