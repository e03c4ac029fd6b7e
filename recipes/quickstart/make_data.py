"""Writes a small instruction set of worked arithmetic word problems: train, validation and eval,
from a seed.

python -m recipes.quickstart.make_data OUT_FOLDER
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

SIZES = {"train": 320, "validation": 48, "eval": 48}
NAMES = (
    "Ada",
    "Ben",
    "Carla",
    "Deniz",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Mona",
)
GOODS = (
    "notebook",
    "candle",
    "mug",
    "lamp",
    "poster",
    "ribbon",
    "puzzle",
    "kite",
    "ladder",
    "basket",
)

Problem = tuple[str, str]


def shopping(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(GOODS)
    count, price = rng.randint(2, 12), rng.randint(2, 25)
    cost = count * price
    paid = (cost // 50 + 1) * 50
    return (
        f"{name} buys {count} {item}s at {price} dollars each and pays with {paid} dollars. How "
        "much change is left?",
        f"The {item}s cost {count} * {price} = {cost} dollars. The change is {paid} - {cost} = "
        f"{paid - cost} dollars. The answer is {paid - cost}.",
    )


def sharing(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(GOODS)
    friends, each, kept = rng.randint(3, 9), rng.randint(2, 12), rng.randint(1, 9)
    total = friends * each + kept
    return (
        f"{name} has {total} {item}s, keeps {kept} and shares the rest equally among {friends} "
        "friends. How many does each friend get?",
        f"After keeping {kept}, {total} - {kept} = {total - kept} {item}s are left. Each friend "
        f"gets {total - kept} / {friends} = {each}. The answer is {each}.",
    )


def journey(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    speed, hours, slow, more = (
        rng.randint(6, 20) * 5,
        rng.randint(1, 5),
        rng.randint(2, 5) * 5,
        rng.randint(1, 4),
    )
    first, second = speed * hours, slow * more
    return (
        f"{name} drives {hours} hours at {speed} km/h and then {more} hours at {slow} km/h. How "
        "far is that in total?",
        f"The first part is {speed} * {hours} = {first} km. The second part is {slow} * {more} = "
        f"{second} km. Together that is {first} + {second} = {first + second} km. The answer is "
        f"{first + second}.",
    )


def saving(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(GOODS)
    weekly, weeks, start = rng.randint(3, 20), rng.randint(3, 12), rng.randint(5, 60)
    saved = weekly * weeks
    return (
        f"{name} has {start} dollars and saves {weekly} dollars a week. How much is there after "
        f"{weeks} weeks to buy a {item}?",
        f"In {weeks} weeks {name} saves {weekly} * {weeks} = {saved} dollars. With the first "
        f"{start} dollars that makes {start} + {saved} = {start + saved}. The answer is "
        f"{start + saved}.",
    )


def harvest(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    rows, trees, fruit, spoiled = (
        rng.randint(2, 9),
        rng.randint(2, 9),
        rng.randint(3, 12),
        rng.randint(1, 10),
    )
    plants = rows * trees
    total = plants * fruit
    return (
        f"{name} picks {fruit} pears from each tree of an orchard with {rows} rows of {trees} "
        f"trees; {spoiled} pears are spoiled. How many good pears are there?",
        f"There are {rows} * {trees} = {plants} trees with {plants} * {fruit} = {total} pears. "
        f"Without the spoiled ones {total} - {spoiled} = {total - spoiled} are good. The answer is "
        f"{total - spoiled}.",
    )


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    shopping,
    sharing,
    journey,
    saving,
    harvest,
)


def problems(seed: int, sizes: Mapping[str, int] = SIZES) -> dict[str, list[Problem]]:
    """The parts, of `sizes` problems each; no problem occurs twice."""
    rng = random.Random(seed)
    distinct: dict[Problem, None] = {}
    while len(distinct) < sum(sizes.values()):
        distinct[rng.choice(KINDS)(rng)] = None
    rows = iter(distinct)
    return {part: [next(rows) for _ in range(size)] for part, size in sizes.items()}


def main(
    folder: Path, seed: Annotated[int, typer.Option(help="Same seed, same files.")] = 0
) -> None:
    """Writes train.jsonl, validation.jsonl and eval.jsonl into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in problems(seed).items():
        lines = (
            json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in rows
        )
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
