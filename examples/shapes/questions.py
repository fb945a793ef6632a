"""Asks about a scene: thirteen kinds of questions from coarse to fine.

Every kind has one answer that the picture determines; within a kind the answers are balanced as
far as the scene allows, so that a guess is right about as often as the number of answers says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scenes import COLORS, LETTERS, SHAPES, SIZES, Scene, Thing

COLUMNS: tuple[str, ...] = ("left", "middle", "right")
CLEARANCE = 14.0
"""Pixels by which two centres must differ for "left of" or "right of" to be asked."""


@dataclass(frozen=True)
class Question:
    """A question, the right answer and the kind it belongs to."""

    kind: str
    text: str
    answer: str


Maker = Callable[[Scene, random.Random], "Question | None"]


def _background(scene: Scene, rng: random.Random) -> Question | None:
    first, second = rng.sample(("dark", "bright"), 2)
    return Question("background", f"is the background {first} or {second}?", scene.background)


def _any_color(scene: Scene, rng: random.Random) -> Question | None:
    present = sorted({t.color for t in scene.things})
    absent = sorted(set(COLORS) - set(present))
    yes = rng.random() < 0.5
    color = rng.choice(present if yes else absent)
    return Question("any_color", f"is there anything {color}?", "yes" if yes else "no")


def _any_shape(scene: Scene, rng: random.Random) -> Question | None:
    present = sorted({t.shape for t in scene.things})
    absent = sorted(set(SHAPES) - set(present))
    yes = rng.random() < 0.5
    if not absent:
        return None
    shape = rng.choice(present if yes else absent)
    return Question("any_shape", f"is there a {shape}?", "yes" if yes else "no")


def _count_all(scene: Scene, rng: random.Random) -> Question | None:
    noun = rng.choice(("objects", "shapes"))
    return Question("count_all", f"how many {noun} are there?", str(len(scene.things)))


def _by_answer(options: Sequence[tuple[str, int]], rng: random.Random) -> tuple[str, int]:
    wanted = rng.choice(sorted({count for _, count in options}))
    return rng.choice([o for o in options if o[1] == wanted])


def _groups(things: Sequence[Thing], sized: bool) -> list[tuple[str, int]]:
    options = [(f"{s}s", sum(t.shape == s for t in things)) for s in SHAPES]
    options += [(f"{z} objects", sum(t.size == z for t in things)) for z in SIZES]
    if sized:
        options += [
            (f"{z} {s}s", sum(t.size == z and t.shape == s for t in things)) for z in SIZES for s in SHAPES
        ]
    return options


def _count_some(scene: Scene, rng: random.Random) -> Question | None:
    options = [o for o in _groups(scene.things, sized=False) if o[1] <= 3]
    group, count = _by_answer(options, rng)
    return Question("count_some", f"how many {group} are there?", str(count))


def _the_only(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    keys = [key(t) for t in scene.things]
    return [t for t in scene.things if keys.count(key(t)) == 1]


def _color_of(scene: Scene, rng: random.Random) -> Question | None:
    forms: list[Callable[[Thing], str]] = [lambda t: t.shape, lambda t: f"{t.size} {t.shape}"]
    form = rng.choice(forms)
    things = _the_only(scene, form)
    if not things:
        return None
    thing = rng.choice(things)
    return Question("color_of", f"what color is the {form(thing)}?", thing.color)


def _shape_of(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    return Question("shape_of", f"what shape is the {thing.color} object?", thing.shape)


def _size_of(scene: Scene, rng: random.Random) -> Question | None:
    size = rng.choice(SIZES)
    thing = rng.choice([t for t in scene.things if t.size == size] or scene.things)
    return Question("size_of", f"is the {thing.name} small or large?", thing.size)


def _column_of(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    text = f"is the {thing.name} at the left, middle or right?"
    return Question("column_of", text, COLUMNS[thing.column])


def _side(scene: Scene, rng: random.Random) -> Question | None:
    pairs = [(a, b) for a in scene.things for b in scene.things if abs(a.x - b.x) >= CLEARANCE]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    text = f"is the {a.name} left or right of the {b.name}?"
    return Question("side", text, "left" if a.x < b.x else "right")


def _count_side(scene: Scene, rng: random.Random) -> Question | None:
    side = rng.choice(("left", "right"))
    options: list[tuple[str, int]] = []
    for anchor in scene.things:
        others = [t for t in scene.things if t is not anchor]
        for group, _ in _groups(scene.things, sized=True):
            members = [t for t in others if _belongs(t, group)]
            if any(abs(t.x - anchor.x) < CLEARANCE for t in members):
                continue
            count = sum((t.x < anchor.x) == (side == "left") for t in members)
            # A zero is worth asking about only where there is something to mistake for an answer.
            if count <= 2 and (count > 0 or members or rng.random() < 0.15):
                options.append((f"how many {group} are {side} of the {anchor.name}?", count))
    if not options:
        return None
    text, count = _by_answer(options, rng)
    return Question("count_side", text, str(count))


def _belongs(thing: Thing, group: str) -> bool:
    for word in group.split():
        if word in COLORS and thing.color != word:
            return False
        if word in SIZES and thing.size != word:
            return False
        if word[:-1] in SHAPES and thing.shape != word[:-1]:
            return False
    return True


def _sign(character: str) -> str:
    return "letter" if character in LETTERS else "digit"


def _character_in(scene: Scene, rng: random.Random) -> Question | None:
    things = [t for t in scene.things if t.character]
    if not things:
        return None
    thing = rng.choice(things)
    text = f"which {_sign(thing.character)} is in the {thing.name}?"
    return Question("character_in", text, thing.character)


def _holder_of(scene: Scene, rng: random.Random) -> Question | None:
    things = [t for t in scene.things if t.character]
    if not things:
        return None
    thing = rng.choice(things)
    what = rng.choice(("color", "shape"))
    text = f"what {what} is the object with the {_sign(thing.character)} {thing.character}?"
    return Question("holder_of", text, thing.color if what == "color" else thing.shape)


KINDS: dict[str, Maker] = {
    "background": _background,
    "any_color": _any_color,
    "any_shape": _any_shape,
    "count_all": _count_all,
    "count_some": _count_some,
    "color_of": _color_of,
    "shape_of": _shape_of,
    "size_of": _size_of,
    "column_of": _column_of,
    "side": _side,
    "count_side": _count_side,
    "character_in": _character_in,
    "holder_of": _holder_of,
}
"""The kinds, coarse ones first."""


def ask(scene: Scene, rng: random.Random, kind: str | None = None) -> Question | None:
    """Ask one question about a scene; None where the scene gives no question of that kind.

    Without a kind, kinds are tried in a random order until one fits.
    """
    if kind is not None:
        return KINDS[kind](scene, rng)
    for candidate in rng.sample(list(KINDS), len(KINDS)):
        question = KINDS[candidate](scene, rng)
        if question is not None:
            return question
    return None
