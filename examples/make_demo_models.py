"""Make the models and the data of ``pkt demo`` from nothing: text, tokenizer, a family of models and a stranger.

    python examples/make_demo_models.py --out pkt/demo/assets        # what the package ships; two hours, 2 cores
    python examples/make_demo_models.py --out /tmp/assets --quick    # the same path in seconds; the models are useless

`base` learns a general text (people, places, things, counting, small stories, short questions about what was said, bare sums);
`teacher` is `base` tuned on the task as well: word problems answered by two sums and a last ``#### 12``. `descendant` is cut out
of `base` to half its width and healed on the general text; `healed` is the same units cut out of `teacher` and healed alike, what
one would do without pkt; `student` is a stranger that learnt the general text from weights of its own. All text is generated
here, from seeded grammars; nothing is downloaded. A model whose folder is there is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from demo_text import Row, distinct, general_row, problem_row, prompt_of, stream, task_row
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import pkt
from pkt.matching import Matrices, Shape, choose_units, shrink_to

VOCAB, CONTEXT, SEED = 512, 192, 2310
PAD, EOS, UNK, USER, ASSISTANT = "<|pad|>", "<|eos|>", "<|unk|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|eos|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
BASE = {"hidden_size": 168, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 6,
        "num_key_value_heads": 3}  # fmt: skip
HALF = Shape(hidden=84, neurons=192, groups=2, layers=5)
STUDENT = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2}  # fmt: skip
ANSWER = re.compile(r"#### (-?\d+)\s*$")


class Recipe(NamedTuple):
    """How a model is trained: rows, of which this share are the task's, at what rate, and its seed."""

    steps: int
    batch: int
    lr: float
    share: float
    seed: int


# The stranger is the oldest, and its recipe stays what it was.
RECIPES = {
    "base": Recipe(1600, 32, 2e-3, 0.0, SEED + 20),
    "teacher": Recipe(900, 32, 1e-3, 0.7, SEED + 21),
    "descendant": Recipe(1500, 32, 2e-3, 0.0, SEED + 22),
    # Its rows, steps and rate are the descendant's, one by one.
    "healed": Recipe(1500, 32, 2e-3, 0.0, SEED + 22),
    "student": Recipe(2500, 128, 3e-3, 0.0, SEED + 11),
}

# ------------------------------------------------------------------------------------------------ tokenizer and batches


def make_tokenizer(corpus: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens over printable ASCII; every digit is a token of its own."""
    tok = Tokenizer(models.BPE(unk_token=UNK))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    # The letters that stand for the bytes of printable ASCII, space and newline.
    alphabet = sorted({c for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(
        "".join(map(chr, range(32, 127))) + "\n") for c in piece})  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[PAD, EOS, UNK, USER, ASSISTANT], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tok.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token=PAD, eos_token=EOS, unk_token=UNK, chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[USER, ASSISTANT], model_max_length=CONTEXT, padding_side="right",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tok: PreTrainedTokenizerFast, rows: list[Row]) -> list[tuple[list[int], int]]:
    """(ids, where the loss starts): after the prompt of a chat row, at the first token of a plain text."""
    full, prompts = [], []
    for row in rows:
        if "text" in row:
            full.append(row["text"] + EOS)
            prompts.append("")
        else:
            q, a = (m["content"] for m in row["messages"])
            prompts.append(f"{USER}\n{q}\n{ASSISTANT}\n")
            full.append(f"{prompts[-1]}{a}{EOS}")
    ids = tok(full, add_special_tokens=False)["input_ids"]
    starts = tok(prompts, add_special_tokens=False)["input_ids"]
    return [(x, len(s)) for x, s in zip(ids, starts, strict=True)]


def collate(items: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(x) for x, _ in items)
    ids = torch.tensor([x + [pad] * (width - len(x)) for x, _ in items])
    labels = torch.tensor([[-100] * s + x[s:] + [-100] * (width - len(x)) for x, s in items])
    return ids, labels


# ------------------------------------------------------------------------------------------------ training


def make_model(shape: dict[str, int], tok: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.update(do_sample=False, max_new_tokens=40, eos_token_id=tok.eos_token_id,
                                   pad_token_id=tok.pad_token_id, bos_token_id=None)  # fmt: skip
    return model


def train(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, rows: Callable[[], Row], *, steps: int, batch: int,
    lr: float, name: str,
) -> None:  # fmt: skip
    """AdamW, a short warm-up, cosine to a twentieth; batches of similar length drawn from an endless stream."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    warm = max(1, min(150, steps // 10))
    sched = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min((s + 1) / warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    model.train()
    shuffle, done, start, running = random.Random(SEED), 0, time.time(), 0.0
    while done < steps:
        chunk = sorted(encode(tok, [rows() for _ in range(16 * batch)]), key=lambda x: len(x[0]))
        batches = [chunk[i : i + batch] for i in range(0, len(chunk), batch)]
        shuffle.shuffle(batches)
        for items in batches[: steps - done]:
            ids, labels = collate(items, tok.pad_token_id)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            sched.step()
            done += 1
            running += (loss.item() - running) / min(done, 50)
            if done % 100 == 0:
                print(f"{name} step {done}/{steps} loss {running:.4f} {time.time() - start:.0f}s", flush=True)
    model.eval()


@torch.no_grad()
def nll(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """Mean negative log-likelihood of a target token, in nats."""
    total = count = 0.0
    items = encode(tok, rows)
    for i in range(0, len(items), 50):
        ids, labels = collate(items[i : i + 50], tok.pad_token_id)
        n = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * n
        count += n
    return total / count


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, rows: list[Row], show: int = 0) -> float:
    """Share of greedy answers whose last ``#### n`` is the right one."""
    hits = 0
    for i in range(0, len(rows), 100):
        part = rows[i : i + 100]
        prompts = [f"{USER}\n{prompt_of(r)}\n{ASSISTANT}\n" for r in part]
        enc = tok(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(input_ids=enc["input_ids"], attention_mask=enc["attention_mask"])
        texts = tok.batch_decode(out[:, enc["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(part, texts, strict=True):
            found, want = ANSWER.search(text), ANSWER.search(row["messages"][1]["content"])
            assert want
            hits += bool(found and found[1] == want[1])
            if show > 0:
                print(f"  {prompt_of(row)}\n    -> {text}", flush=True)
                show -= 1
    return hits / len(rows)


# ------------------------------------------------------------------------------------------------ everything


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8", newline="\n")


def make_data(quick: bool) -> tuple[dict[str, list[Row]], set[str]]:
    """The splits, and the text of all of them, which no model is trained on."""
    n_seeds, n_train, n_test, n_wrong, n_general = (8, 32, 16, 8, 16) if quick else (32, 800, 200, 32, 300)
    r, taken = random.Random(SEED), set[str]()
    # The general rows come after as many problems as when `student` was trained, so that they are those that it never saw.
    for n in (n_seeds, n_train, n_test):
        distinct(problem_row, r, n, taken)

    def plain(r: random.Random) -> Row:
        return next(row for row in iter(lambda: general_row(r), None) if "text" in row)

    wrong, general = distinct(plain, r, n_wrong, taken), distinct(general_row, r, n_general, taken)
    tasks = random.Random(SEED + 5)
    splits = {name: distinct(task_row, tasks, n, taken)
              for name, n in (("seeds", n_seeds), ("train", n_train), ("test", n_test))}  # fmt: skip
    return {**splits, "wrong_task": wrong, "general": general}, taken


def units_of_descendant(base: LlamaForCausalLM, tok: PreTrainedTokenizerFast, taken: set[str]) -> Any:
    """The units of `base` that matter most for 64 general rows: what its descendant keeps."""
    rows = stream(SEED + 30, 0.0, taken)
    items = encode(tok, [rows() for _ in range(64)])
    batches = []
    for i in range(0, len(items), 8):
        ids, labels = collate(items[i : i + 8], tok.pad_token_id)
        batches.append({"input_ids": ids, "attention_mask": (ids != tok.pad_token_id).long(), "labels": labels})
    return choose_units(Matrices(base), pkt.sensitivity(base, batches, progress=False), HALF)


def begin(name: str, out: Path, tok: PreTrainedTokenizerFast, taken: set[str]) -> LlamaForCausalLM:
    """A model as it is before its training."""
    read = lambda folder: AutoModelForCausalLM.from_pretrained(out / folder, dtype=torch.float32)  # noqa: E731
    if name == "base":
        return make_model(BASE, tok, SEED + 4)
    if name == "student":
        return make_model(STUDENT, tok, SEED + 3)
    base = read("base")
    if name == "teacher":
        return base
    units = units_of_descendant(base.eval(), tok, taken)
    small = shrink_to(read("teacher") if name == "healed" else base, units, rescale=False)
    small.generation_config = base.generation_config
    return small


def make(out: Path, *, quick: bool = False, only: list[str] | None = None) -> None:
    splits, taken = make_data(quick)
    for name, rows in splits.items():
        write_jsonl(out / "data" / f"{name}.jsonl", rows)
    corpus = random.Random(SEED + 1)
    sample = (general_row(corpus) if i % 2 else problem_row(corpus) for i in range(600 if quick else 6000))
    tok = make_tokenizer(s for row in sample for s in ([row["text"]] if "text" in row else
                                                       [m["content"] for m in row["messages"]]))  # fmt: skip
    for name, recipe in RECIPES.items():
        if (only and name not in only) or (out / name).exists():
            continue
        steps, batch = (4, 8) if quick else (recipe.steps, recipe.batch)
        model = begin(name, out, tok, taken)
        train(model, tok, stream(recipe.seed, recipe.share, taken), steps=steps, batch=batch, lr=recipe.lr, name=name)
        model.to(torch.bfloat16).save_pretrained(out / name)
        tok.save_pretrained(out / name, save_jinja_files=False)
    if not only:
        card = describe(measured(out, splits), splits, quick)
        (out / "README.md").write_text(card, encoding="utf-8", newline="\n")
        print(card[card.index("| model") :], flush=True)


def measured(out: Path, splits: dict[str, list[Row]]) -> dict[str, list[str]]:
    """What each model reaches, on what was written, not on what was trained: general NLL, task NLL, exact match."""
    tok, found = AutoTokenizer.from_pretrained(out / "student"), {}
    for name in RECIPES:
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval()
        general, task = (nll(model, tok, splits[split]) for split in ("general", "test"))
        match, c = exact_match(model, tok, splits["test"]), model.config
        shape = [sum(p.numel() for p in model.parameters()), c.hidden_size, c.intermediate_size, c.num_hidden_layers]
        heads = f"{c.num_attention_heads} / {c.num_key_value_heads}"
        found[name] = [*(f"{n:,}" for n in shape), heads, f"{general:.3f}", f"{task:.3f}", f"{match:.1%}"]
    return found


def describe(figures: dict[str, list[str]], splits: dict[str, list[Row]], quick: bool) -> str:
    task = {name: f"{r.steps * r.batch * r.share:,.0f}" for name, r in RECIPES.items()}
    task["healed"] += f", its teacher {task['teacher']}"
    rows = "\n".join(
        f"| {name} | {' | '.join(figures[name][:5])} | {r.steps} x {r.batch} | {task[name]} | "
        f"{' | '.join(figures[name][5:])} |"
        for name, r in RECIPES.items()
    )
    example = splits["test"][0]["messages"]
    counts = ", ".join(f"`{k}.jsonl` {len(v)}" for k, v in splits.items())
    return f"""# The models and data of `pkt demo`

Written by `examples/make_demo_models.py`{" --quick: a smoke run, not for use" if quick else ""}. Everything here, text
included, is generated by that script from fixed seeds; nothing was taken from anywhere. Licence: Apache-2.0, like the
rest of pkt.

Five Llama-architecture models, trained in fp32 and stored in bfloat16, with one byte-level BPE tokenizer of {VOCAB} tokens
(printable ASCII; every digit is its own token), untied embeddings and heads of 32. All learnt the general text: people, places,
things, counting, days, small stories, questions about what was just said, and bare sums ("What is 7+5?"). Only the teacher was
tuned on the task ({RECIPES["teacher"].share:.0%} of its rows, loss on the answer); no row of `data/` was among any model's rows.
They are toys, fit to show what the tool does.

* `base`: general text, from random weights. `teacher`: `base`, tuned on the task.
* `descendant`: the units of `base` that matter most for general text, half its width, healed on general text.
* `healed`: the same units of `teacher`, healed on the same rows in as many steps at the same rate: what one would do without pkt.
* `student`: a stranger, general text from random weights of its own.

The task, word problems of two sums or differences with numbers up to 10:

> {example[0]["content"]}
>
> {example[1]["content"]}

Data: {counts}. No row is in two files; `wrong_task.jsonl` and `general.jsonl` are general text.

Measured on the stored weights, computed in fp32: NLL in nats a token, on `general.jsonl` and on the answers of `test.jsonl`; exact
match of greedy answers on `test.jsonl`. Task rows are those that the model was trained on, or the one it was cut out of.

| model | parameters | hidden | FFN | layers | heads / kv | steps x rows | task rows | general NLL | task NLL | task exact match |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models, data/ and README.md")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that only shows the path works")
    parser.add_argument("--only", nargs="+", choices=RECIPES, help="train these models alone, and write no README.md")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    make(args.out, quick=args.quick, only=args.only)


if __name__ == "__main__":
    main()
