"""The text of ``pkt demo``'s models, from seeded grammars: general sentences and questions, and word problems with sums."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Problem = tuple[str, list[str], int]  # question, steps, result

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


def problem_row(r: random.Random) -> Row:
    """A word problem of any kind."""
    question, steps, result = problem(r)
    return chat(question, answer(steps, result))


def task_row(r: random.Random) -> Row:
    """A word problem of the task: two sums or differences, no number above 10."""
    while True:
        question, steps, result = problem(r)
        numbers = [int(n) for step in steps for n in step.replace("-", "+").replace("=", "+").split("+") if n.isdigit()]
        if len(steps) == 2 and len(numbers) == 6 and max(numbers) <= 10:
            return chat(question, answer(steps, result))


def prompt_of(row: Row) -> str:
    return row["text"] if "text" in row else row["messages"][0]["content"]


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


def stream(seed: int, task_share: float, taken: set[str]) -> Callable[[], Row]:
    """Rows without end, none of them in ``taken``: this share of them the task's, the rest general."""
    rng = random.Random(seed)

    def draw() -> Row:
        while prompt_of(row := task_row(rng) if rng.random() < task_share else general_row(rng)) in taken:
            pass
        return row

    return draw
