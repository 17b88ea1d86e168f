"""Make the models and the data of ``pkt demo`` from nothing: text, tokenizer, teacher, student.

    python examples/make_demo_models.py --out pkt/demo/assets        # what the package ships; half an hour, 2 cores
    python examples/make_demo_models.py --out /tmp/assets --quick    # the same path in seconds; the models are useless

Both models learn a general text (people, places, things, counting, small stories, short questions about what
was said, bare sums). Only the teacher also learns the task: arithmetic word problems of two or three steps,
answered by the steps and a last ``#### 42``. All text is generated here, from seeded grammars; nothing is downloaded.
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
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

Row = dict[str, Any]
Problem = tuple[str, list[str], int]  # question, steps, result

VOCAB, CONTEXT, SEED = 512, 192, 2310
PAD, EOS, UNK, USER, ASSISTANT = "<|pad|>", "<|eos|>", "<|unk|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|eos|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
           "num_key_value_heads": 3}  # fmt: skip
STUDENT = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2}  # fmt: skip
ANSWER = re.compile(r"#### (-?\d+)\s*$")

# ------------------------------------------------------------------------------------------------ words


def words(text: str) -> list[str]:
    return text.split()


PEOPLE = [(n, "He", "his") for n in words("Tom Sam Ben Leo Max Jack Adam Omar Ivan Paul Hugo Finn")] + [
    (n, "She", "her") for n in words("Ann Mia Eva Lucy Nina Rosa Zoe Ella Kate Maya Iris Lena")
]
FRUIT = words("apples pears plums lemons figs nuts cakes eggs")
THINGS = words("books pens cards balls coins stamps shells stones beads cups hats kites toys keys")
HOLDERS = words("boxes bags baskets jars trays")
COLOURS = words("red blue green yellow white black brown grey")
PLACES = words("park market school garden forest river farm library station kitchen")
ANIMALS = words("cat dog horse cow bird fish mouse fox bear duck")
SIZES = dict(zip(ANIMALS, [4, 5, 9, 8, 2, 2, 1, 6, 10, 3], strict=True))
SOUNDS = {"cat": "meows", "dog": "barks", "cow": "moos", "bird": "sings", "duck": "quacks", "bear": "growls"}
NUMBERS = words("zero one two three four five six seven eight nine ten eleven twelve")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
WEATHER = words("sunny cold windy warm cloudy rainy")
MOODS = words("happy tired hungry proud calm sad")


def one(thing: str) -> str:
    return {"boxes": "box"}.get(thing, thing[:-1])


def many(n: int, thing: str) -> str:
    return f"{n} {one(thing) if n == 1 else thing}"


def chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# ------------------------------------------------------------------------------------------------ general text


def fact(r: random.Random) -> str:
    """A bare sum, difference, product or quotient, no story around it."""
    if r.random() < 0.7:
        x, y = r.sample([r.randint(1, 48), r.randint(1, 12)], 2)
        return f"{x}+{y}={x + y}" if r.random() < 0.5 else f"{x + y}-{y}={x}"
    x, y = r.randint(2, 6), r.randint(2, 12 if r.random() < 0.3 else 8)
    return f"{x}*{y}={x * y}" if r.random() < 0.7 else f"{x * y}/{x}={y}"


def general_row(r: random.Random) -> Row:
    """One small text: most are plain sentences, a third are questions answered in the chat format. No word problems."""
    (a, he, his), (b, she, _) = r.sample(PEOPLE, 2)
    place, other = r.sample(PLACES, 2)
    colour, shade = r.sample(COLOURS, 2)
    thing, extra = r.sample(THINGS + FRUIT, 2)
    beast, rival = r.sample(ANIMALS, 2)
    n, m = r.sample(range(2, 61), 2)
    day, mood = r.randrange(7), r.choice(MOODS)
    kind = r.randrange(22)
    if kind == 0:
        return {"text": f"{a} walks to the {place} with a {colour} {one(thing)}. {he} meets {b} there. {b} likes the "
                        f"{one(thing)} because it is {colour}. They are {mood}."}  # fmt: skip
    if kind == 1:
        k, step = r.randint(1, 50), r.randint(4, 9)
        return {"text": f"{a} counts the {thing}: {', '.join(str(k + i) for i in range(step))}."}
    if kind == 2:
        k = r.randint(0, 12 - 4)
        return {"text": f"{b} counts {r.choice(['slowly', 'aloud'])}: {', '.join(NUMBERS[k : k + 4])}."}
    if kind == 3:
        return {"text": f"Today is {DAYS[day]}. It is {r.choice(WEATHER)} and {a} goes to the {place}. Tomorrow is "
                        f"{DAYS[(day + 1) % 7]} and {he.lower()} goes to the {other}."}  # fmt: skip
    if kind == 4:
        small, big = sorted((beast, rival), key=lambda x: (SIZES[x], x))
        if SIZES[small] == SIZES[big]:
            return {"text": f"A {small} is as big as a {big}. {a} has seen a {small} near the {place}."}
        return {"text": f"A {big} is bigger than a {small}. A {small} is smaller than a {big}."}
    if kind == 5:
        beast = r.choice(list(SOUNDS))
        return {"text": f"The {beast} of {a} is {colour}. It sleeps in the {place}. The {beast} {SOUNDS[beast]} when "
                        f"{he.lower()} comes home."}  # fmt: skip
    if kind == 6:
        return {"text": f"{a} has {many(n, thing)} and {b} has {many(m, extra)}. The {thing} of {a} are {colour}. The "
                        f"{extra} of {b} are {shade}."}  # fmt: skip
    if kind == 7:
        i = r.randrange(12)
        return {"text": f"{MONTHS[(i + 1) % 12]} comes after {MONTHS[i]}. In {MONTHS[i]} {a} works at the {place}."}
    if kind == 8:
        return {"text": f"{a} loses {his} {colour} {one(thing)} at the {place}. {b} finds it and gives it back. {a} is "
                        f"{r.choice(['happy', 'proud'])} and says thank you to {b}."}  # fmt: skip
    if kind == 9:
        return {"text": f"There are {n} {thing} in the {place}. Some are {colour} and some are {shade}. {a} buys the "
                        f"{colour} ones and {b} sells the {shade} ones."}  # fmt: skip
    if kind == 10:
        box = r.choice(HOLDERS)
        return {"text": f"{a} puts the {thing} into {colour} {box} and gives each {one(box)} to {b}. {she} takes the "
                        f"{box} to the {place}."}  # fmt: skip
    if kind == 11:
        return {"text": f"Once a {colour} {beast} lived near the {place}. A {rival} came and the {beast} was {mood}. "
                        f"They went to the {other} together and now they are friends."}  # fmt: skip
    story = f"{a} has {many(n, thing)}. {b} has {many(m, extra)}."
    if kind == 12:
        who, count, what = r.choice([(a, n, thing), (b, m, extra)])
        return chat(f"{story} How many {what} does {who} have?", f"{who} has {many(count, what)}.")
    if kind == 13:
        who, what = r.choice([(a, thing), (b, extra)])
        return chat(f"{story} Who has the {what}?", f"{who} has the {what}.")
    if kind == 14:
        question = f"{a} is at the {place} and {b} is at the {other}. Where is {b if day % 2 else a}?"
        return chat(question, f"{b} is at the {other}." if day % 2 else f"{a} is at the {place}.")
    if kind == 15:
        return chat(f"What day comes after {DAYS[day]}?", f"{DAYS[(day + 1) % 7]} comes after {DAYS[day]}.")
    if kind == 16:
        return chat(f"What number comes after {n}?", f"{n + 1} comes after {n}.")
    if kind > 17:
        equation = fact(r)
        return chat(f"What is {equation.split('=')[0]}?", f"{equation}.")
    return chat(
        f"The {one(thing)} of {a} is {colour}. The {one(extra)} of {b} is {shade}. What colour is the {one(thing)}?",
        f"The {one(thing)} is {colour}.",
    )


# ------------------------------------------------------------------------------------------------ the task


def _more_or_less(r: random.Random, a: str, b: str, he: str, thing: str, have: int) -> tuple[str, str, int]:
    """One event of a story about ``have`` things: a sentence, its step, what is left."""
    n = r.randint(1, min(9, have - 1)) if have > 10 or (have > 2 and r.random() < 0.5) else 0
    if n:
        verbs = ["loses {0}", "sells {0}", f"gives {{0}} to {b}", *(["eats {0}"] if thing in FRUIT else [])]
        return f"{he} {r.choice(verbs).format(n)}.", f"{have}-{n}={have - n}", have - n
    n = r.randint(1, 9)
    verb = r.choice([f"{he} buys {{0}} more.", f"{he} finds {{0}} more.", f"{b} gives {a} {{0}} more."])
    return verb.format(n), f"{have}+{n}={have + n}", have + n


def problem(r: random.Random) -> Problem:
    """A word problem of two or three steps; every number on the way is between 1 and 60."""
    (a, he, _), (b, _, _) = r.sample(PEOPLE, 2)
    thing = r.choice(THINGS + FRUIT)
    box = r.choice(HOLDERS)
    kind = r.randrange(6)
    if kind == 0:  # some, then more or less, two or three times
        have = r.randint(2, 12)
        text, steps = f"{a} has {many(have, thing)}.", []
        for _ in range(2 if r.random() < 0.7 else 3):
            sentence, step, have = _more_or_less(r, a, b, he, thing, have)
            text, steps = f"{text} {sentence}", [*steps, step]
        return f"{text} How many {thing} does {a} have now?", steps, have
    if kind == 1:  # groups, then more or less
        n, m = r.randint(2, 6), r.randint(2, 8)
        sentence, step, have = _more_or_less(r, a, b, he, thing, n * m)
        text = f"{a} has {n} {box} with {m} {thing} in each {one(box)}. {sentence}"
        return f"{text} How many {thing} does {a} have now?", [f"{n}*{m}={n * m}", step], have
    if kind == 2:  # a comparison, then the sum
        n, m = r.randint(2, 12), r.randint(1, 9)
        if r.random() < 0.35:
            k = r.randint(2, 4)
            relation = f"{'twice' if k == 2 else f'{k} times'} as many {thing} as"
            step, k = f"{k}*{n}={k * n}", k * n
        else:
            fewer = m < n and r.random() < 0.5
            relation = f"{m} {'fewer' if fewer else 'more'} {one(thing) if m == 1 else thing} than"
            k = n - m if fewer else n + m
            step = f"{n}{'-' if fewer else '+'}{m}={k}"
        text = f"{a} has {many(n, thing)}. {b} has {relation} {a}. How many {thing} do they have together?"
        return text, [step, f"{n}+{k}={n + k}"], n + k
    if kind == 3:  # a purchase
        n, price, hat = r.randint(2, 6), r.randint(2, 8), r.randint(1, 9)
        text = f"One {one(thing)} costs {price} dollars. {a} buys {n} {thing} and a bag for {many(hat, 'dollars')}."
        total = n * price
        steps = [f"{n}*{price}={total}", f"{total}+{hat}={total + hat}"]
        return f"{text} How many dollars does {a} pay?", steps, total + hat
    if kind == 4:  # the change
        n, price = r.randint(2, 6), r.randint(2, 8)
        total = n * price
        money = total + r.randint(1, 9)
        text = f"{a} has {money} dollars. {he} buys {n} {thing} for {price} dollars each. How many dollars are left?"
        return text, [f"{n}*{price}={total}", f"{money}-{total}={money - total}"], money - total
    # sharing, then one share grows or shrinks
    n, m = r.randint(2, 6), r.randint(2, 8)
    sentence, step, have = _more_or_less(r, a, b, he, thing, m)
    text = f"{b} has {n * m} {thing} and puts the same number into each of {n} {box}. {a} takes one {one(box)}."
    return f"{text} {sentence} How many {thing} does {a} have now?", [f"{n * m}/{n}={m}", step], have


def answer(steps: list[str], result: int) -> str:
    return " ".join(f"{s}." for s in steps) + f" #### {result}"


def task_row(r: random.Random) -> Row:
    question, steps, result = problem(r)
    return chat(question, answer(steps, result))


# ------------------------------------------------------------------------------------------------ data and tokenizer


def distinct(make: Callable[[random.Random], Row], r: random.Random, n: int, taken: set[str]) -> list[Row]:
    """``n`` rows whose text is in no other split; ``taken`` grows."""
    rows: list[Row] = []
    while len(rows) < n:
        row = make(r)
        key = prompt_of(row)
        if key not in taken:
            taken.add(key)
            rows.append(row)
    return rows


def prompt_of(row: Row) -> str:
    return row["text"] if "text" in row else row["messages"][0]["content"]


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
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, stream: Callable[[], Row], *, steps: int, batch: int,
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
        chunk = sorted(encode(tok, [stream() for _ in range(16 * batch)]), key=lambda x: len(x[0]))
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


def make(out: Path, *, quick: bool = False, teacher_steps: int = 0, student_steps: int = 0) -> None:
    start = time.time()
    teacher_steps = teacher_steps or (4 if quick else 2600)
    student_steps = student_steps or (4 if quick else 2500)
    sizes = (8, 32, 16, 8, 16) if quick else (32, 800, 200, 32, 300)
    n_seeds, n_train, n_test, n_wrong, n_general = sizes

    r, taken = random.Random(SEED), set[str]()
    splits = {name: distinct(task_row, r, n, taken)
              for name, n in (("seeds", n_seeds), ("train", n_train), ("test", n_test))}  # fmt: skip

    def plain(r: random.Random) -> Row:
        return next(row for row in iter(lambda: general_row(r), None) if "text" in row)

    splits["wrong_task"] = distinct(plain, r, n_wrong, taken)
    general_test = distinct(general_row, r, n_general, taken)
    for name, rows in splits.items():
        write_jsonl(out / "data" / f"{name}.jsonl", rows)

    corpus = random.Random(SEED + 1)
    sample = (general_row(corpus) if i % 2 else task_row(corpus) for i in range(600 if quick else 6000))
    tok = make_tokenizer(s for row in sample for s in ([row["text"]] if "text" in row else
                                                       [m["content"] for m in row["messages"]]))  # fmt: skip

    def stream(seed: int, task_share: float) -> Callable[[], Row]:
        rng = random.Random(seed)

        def draw() -> Row:
            while prompt_of(row := task_row(rng) if rng.random() < task_share else general_row(rng)) in taken:
                pass
            return row

        return draw

    runs = (("teacher", TEACHER, teacher_steps, 0.6, 2e-3), ("student", STUDENT, student_steps, 0.0, 3e-3))
    figures = []
    for i, (name, shape, steps, share, lr) in enumerate(runs):
        began = time.time()
        model = make_model(shape, tok, SEED + 2 + i)
        rows = stream(SEED + 10 + i, share)
        train(model, tok, rows, steps=steps, batch=8 if quick else (64, 128)[i], lr=lr, name=name)
        model.to(torch.bfloat16).save_pretrained(out / name)
        tok.save_pretrained(out / name, save_jinja_files=False)
        seconds = time.time() - began

        # Measured on what was written, not on what was trained.
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval()
        saved = AutoTokenizer.from_pretrained(out / name)
        figures.append({
            "model": name, "shape": shape, "steps": steps, "task share": share, "seconds": seconds,
            "parameters": sum(p.numel() for p in model.parameters()),
            "general NLL": nll(model, saved, general_test), "task NLL": nll(model, saved, splits["test"]),
            "exact match": exact_match(model, saved, splits["test"], show=0 if quick else 4),
        })  # fmt: skip
    card = describe(figures, splits, n_general, quick)
    (out / "README.md").write_text(card, encoding="utf-8", newline="\n")
    print(f"{card[card.index('| model') :]}{(time.time() - start) / 60:.1f} minutes", flush=True)


def describe(figures: list[Row], splits: dict[str, list[Row]], n_general: int, quick: bool) -> str:
    rows = "\n".join(
        f"| {f['model']} | {f['parameters']:,} | {s['hidden_size']} | {s['intermediate_size']} | "
        f"{s['num_hidden_layers']} | {s['num_attention_heads']} / {s['num_key_value_heads']} | {f['steps']} | "
        f"{f['general NLL']:.3f} | {f['task NLL']:.3f} | {f['exact match']:.1%} |"
        for f in figures
        for s in [f["shape"]]
    )
    example = splits["test"][0]["messages"]
    counts = ", ".join(f"`{k}.jsonl` {len(v)}" for k, v in splits.items())
    return f"""# The models and data of `pkt demo`

Written by `examples/make_demo_models.py`{" --quick: a smoke run, not for use" if quick else ""}. Everything here, text
included, is generated by that script from fixed seeds; nothing was taken from anywhere. Licence: Apache-2.0, like the
rest of pkt.

Two Llama-architecture models, trained from random weights in fp32 and stored in bfloat16, with one byte-level BPE
tokenizer of {VOCAB} tokens (printable ASCII; every digit is its own token), untied embeddings and heads of 32. Both
learned the general text: people, places, things, counting, days, small stories, questions about what was just said,
and bare sums ("What is 7+5?"). Only the teacher also saw the task: {figures[0]["task share"]:.0%} of its rows, loss on
the answer, none of them a problem of `data/`. They are toys, fit to show what the tool does.

The task, word problems of two or three steps with numbers up to 60:

> {example[0]["content"]}
>
> {example[1]["content"]}

Data: {counts}. No problem is in two files; `wrong_task.jsonl` is general text.

Measured on the stored weights, computed in fp32: NLL in nats a token, on {n_general} general rows and on the answers of
`test.jsonl`; exact match of greedy answers on `test.jsonl`.

| model | parameters | hidden | FFN | layers | heads / kv | steps | general NLL | task NLL | task exact match |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher/, student/, data/ and README.md")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that only shows the path works")
    parser.add_argument("--teacher-steps", type=int, default=0)
    parser.add_argument("--student-steps", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    make(args.out, quick=args.quick, teacher_steps=args.teacher_steps, student_steps=args.student_steps)


if __name__ == "__main__":
    main()
