"""Pictures to check an export with, where the user gives none: cluttered enough to spread the scores."""

import numpy as np
from PIL import Image, ImageDraw


def check_pictures(count: int, size: tuple[int, int] = (480, 360), seed: int = 0) -> list[Image.Image]:
    """Draw ``count`` different pictures: a colour gradient, noise, and rectangles and discs on it.

    Args:
        count: How many.
        size: Width and height in pixels.
        seed: Of the first picture.
    """
    return [_draw(size, np.random.Generator(np.random.PCG64(seed + index))) for index in range(count)]


def _draw(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    width, height = size
    corner = rng.uniform(0, 255, (2, 2, 3))
    x, y = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    gradient = (corner[0, 0] * (1 - x) + corner[0, 1] * x) * (1 - y) + (
        corner[1, 0] * (1 - x) + corner[1, 1] * x
    ) * y
    noisy = gradient + rng.normal(0, 12, (height, width, 1))
    picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for index in range(8):
        left, top = rng.uniform(0, width * 0.9), rng.uniform(0, height * 0.9)
        side = rng.uniform(0.06, 0.25) * height
        colour = tuple(int(channel) for channel in rng.integers(0, 256, 3))
        shape = draw.rectangle if index % 2 else draw.ellipse
        shape((left, top, left + side, top + side), fill=colour)
    return picture
