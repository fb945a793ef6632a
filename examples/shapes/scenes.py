"""Draws the example's pictures: coloured shapes on cluttered backgrounds.

A picture is a 3 x 3 arrangement of cells; two to four of them hold one object each. An object
has a colour of its own, a shape and a size, and a large object may carry a letter or a digit. Everything is
a function of the random generator that is handed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 144
PATCH_SIZE = 12
GRID = IMAGE_SIZE // PATCH_SIZE
CELLS = 3
CELL = IMAGE_SIZE // CELLS

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (44, 84, 214),
    "yellow": (236, 206, 48),
    "purple": (150, 62, 190),
    "cyan": (60, 200, 214),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond")
SIZES: tuple[str, ...] = ("small", "large")
LETTERS: tuple[str, ...] = ("A", "C", "H", "K", "T", "X")
DIGITS: tuple[str, ...] = ("2", "4", "5", "8")
CHARACTERS: tuple[str, ...] = LETTERS + DIGITS
BACKGROUNDS: tuple[str, ...] = ("dark", "bright")

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object: what it is, and where its centre lies, in pixels."""

    color: str
    shape: str
    size: str
    character: str
    x: float
    y: float
    radius: float
    row: int
    column: int
    tint: Color

    @property
    def name(self) -> str:
        """Colour and shape; the colour is unique within a scene."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The objects in reading order, and what is needed to draw the background."""

    things: tuple[Thing, ...]
    background: str
    background_seed: int


def _tint(rng: random.Random, color: Color, spread: int) -> Color:
    red, green, blue = (max(0, min(255, c + rng.randint(-spread, spread))) for c in color)
    return red, green, blue


def draw_scene(rng: random.Random, *, fewest: int = 2, most: int = 4) -> Scene:
    """Draw a scene of ``fewest`` to ``most`` objects, no two of the same colour.

    A scene uses two or three shapes only, so that shapes repeat and counting is worth asking about.
    """
    count = rng.randint(fewest, most)
    shapes = rng.sample(SHAPES, rng.randint(2, 3))
    pairs = [(color, rng.choice(shapes)) for color in rng.sample(list(COLORS), count)]
    cells = sorted(rng.sample(range(CELLS * CELLS), count))
    characters = rng.sample(CHARACTERS, count)
    things = []
    for (color, shape), cell, character in zip(pairs, cells, characters, strict=True):
        size = rng.choice(SIZES)
        radius = rng.uniform(18.5, 21.0) if size == "large" else rng.uniform(9.5, 11.5)
        slack = min(8.0, CELL / 2 - radius - 1)
        row, column = divmod(cell, CELLS)
        things.append(
            Thing(
                color=color,
                shape=shape,
                size=size,
                character=character if size == "large" and rng.random() < 0.75 else "",
                x=(column + 0.5) * CELL + rng.uniform(-slack, slack),
                y=(row + 0.5) * CELL + rng.uniform(-slack, slack),
                radius=radius,
                row=row,
                column=column,
                tint=_tint(rng, COLORS[color], 18),
            )
        )
    return Scene(tuple(things), rng.choice(BACKGROUNDS), rng.getrandbits(32))


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Corner points of a shape with corners."""
    x, y, r = thing.x, thing.y, thing.radius
    if thing.shape == "square":
        half = 0.86 * r
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if thing.shape == "triangle":
        return [(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)]
    return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, fill: int | Color) -> None:
    if thing.shape == "circle":
        x, y, r = thing.x, thing.y, 0.95 * thing.radius
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        draw.polygon(outline(thing), fill=fill)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_character(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    below = 0.28 * thing.radius if thing.shape == "triangle" else 0.0
    size = 22 if thing.shape in ("triangle", "diamond") else 26
    luminance = sum(w * c for w, c in zip((0.3, 0.59, 0.11), thing.tint, strict=True))
    ink = (10, 10, 10) if luminance > 120 else (250, 250, 250)
    draw.text(
        (thing.x, thing.y + below),
        thing.character,
        fill=ink,
        font=_font(size),
        anchor="mm",
        stroke_width=0.6,
        stroke_fill=ink,
    )


def _background(scene: Scene) -> Image.Image:
    rng = random.Random(scene.background_seed)
    noise = np.random.default_rng(scene.background_seed)
    base = 60 if scene.background == "dark" else 190
    coarse = base + noise.normal(0, 10, (5, 5, 1)) + noise.normal(0, 5, (5, 5, 3))
    field = Image.fromarray(coarse.clip(0, 255).astype(np.uint8), "RGB")
    image = field.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 10)):
        grey = base + rng.randint(-35, 35)
        color = _tint(rng, (grey, grey, grey), 14)
        x, y = rng.uniform(0, IMAGE_SIZE), rng.uniform(0, IMAGE_SIZE)
        angle, length = rng.uniform(0, math.pi), rng.uniform(8, 40)
        dx, dy = length * math.cos(angle), length * math.sin(angle)
        if rng.random() < 0.6:
            draw.line((x, y, x + dx, y + dy), fill=color, width=rng.randint(1, 2))
        else:
            r = rng.uniform(1.5, 4)
            draw.ellipse((x - r, y - r, x + r, y + r), outline=color)
    return image


def render(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    image = _background(scene)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(draw, thing, thing.tint)
        if thing.character:
            _draw_character(draw, thing)
    return image


def patch_owners(scene: Scene, threshold: float = 0.25) -> NDArray[np.int64]:
    """For every patch the index of the object that covers it, or -1; shape (GRID, GRID)."""
    ids = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    draw = ImageDraw.Draw(ids)
    for index, thing in enumerate(scene.things):
        _draw_thing(draw, thing, index + 1)
    blocks = np.asarray(ids).reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).transpose(0, 2, 1, 3)
    owners = np.full((GRID, GRID), -1, dtype=np.int64)
    best = np.full((GRID, GRID), threshold)
    for index in range(len(scene.things)):
        cover = (blocks == index + 1).mean(axis=(2, 3))
        wins = cover >= best
        owners[wins] = index
        best[wins] = cover[wins]
    return owners


@dataclass(frozen=True)
class DenseLabels:
    """Per-patch labels; class 0 is background, offsets are in patches and only valid on objects."""

    color: NDArray[np.int64]
    shape: NDArray[np.int64]
    size: NDArray[np.int64]
    character: NDArray[np.int64]
    centre: NDArray[np.int64]
    offset: NDArray[np.float32]


def dense_labels(scene: Scene) -> DenseLabels:
    """What every patch should know about the object that it belongs to (flattened, GRID**2)."""
    owners = patch_owners(scene).reshape(-1)
    colors = list(COLORS)

    def table(values: Sequence[int]) -> NDArray[np.int64]:
        return np.array([*values, 0], dtype=np.int64)[owners]

    things = scene.things
    centres = np.array([(t.x, t.y) for t in things] + [(0.0, 0.0)], dtype=np.float32) / PATCH_SIZE
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    here = np.stack([columns + 0.5, rows + 0.5], axis=1).astype(np.float32)
    is_centre = np.zeros(GRID * GRID, dtype=np.int64)
    for thing in things:
        is_centre[int(thing.y // PATCH_SIZE) * GRID + int(thing.x // PATCH_SIZE)] = 1
    return DenseLabels(
        color=table([1 + colors.index(t.color) for t in things]),
        shape=table([1 + SHAPES.index(t.shape) for t in things]),
        size=table([1 + SIZES.index(t.size) for t in things]),
        character=table([1 + (CHARACTERS.index(t.character) + 1 if t.character else 0) for t in things]),
        centre=is_centre,
        offset=(centres[owners] - here).astype(np.float32),
    )


def describe(scene: Scene) -> str:
    """All objects in reading order."""
    parts = [
        f"{t.size} {t.color} {t.shape}" + (f" with {t.character}" if t.character else "")
        for t in scene.things
    ]
    return ", ".join(parts)
