"""Position ids of a prompt before anything is pruned.

Read by the torch reference and by the runtimes: no torch here.
"""

import numpy as np

from edgeprune.errors import PromptError
from edgeprune.visual_layout import Int64Array, VisualLayout

SEQUENTIAL = "sequential"
"""Rows are numbered one after the other: [1, S]."""

MULTIMODAL = "multimodal"
"""Qwen2-VL's M-RoPE: time, row and column, [3, S]. Text has the same on all three; a visual token stands at the
picture's start, plus its row and column; behind a picture, counting goes on from the largest."""

AXES = {SEQUENTIAL: 1, MULTIMODAL: 3}


def prompt_positions(kind: str, is_visual: np.ndarray, visual: VisualLayout | None) -> Int64Array:
    """Position ids [A, S] of an unpruned prompt.

    Args:
        kind: :data:`SEQUENTIAL` or :data:`MULTIMODAL`.
        is_visual: [S] bool, the rows of visual tokens.
        visual: Where the visual tokens stand; None without pictures.

    Raises:
        PromptError: Rows and layout disagree about the number of visual tokens.
    """
    num_rows = is_visual.shape[0]
    if kind == SEQUENTIAL or visual is None:
        return np.tile(np.arange(num_rows, dtype=np.int64), (AXES[kind], 1))
    if int(is_visual.sum()) != visual.slots.shape[0]:
        raise PromptError(
            f"the prompt holds {int(is_visual.sum())} visual tokens, its pictures {visual.slots.shape[0]}: "
            "expand each picture's placeholder to its visual tokens"
        )
    positions = np.empty((3, num_rows), np.int64)
    rows = np.flatnonzero(is_visual)
    row, start = 0, 0
    shown = visual.places[visual.slots]
    for index, grid in enumerate(visual.grids):
        places = shown[shown[:, 0] == index]
        first = int(rows[0])
        positions[:, row:first] = np.arange(start, start + first - row)
        start += first - row
        end = first + places.shape[0]
        positions[0, first:end] = start
        positions[1:, first:end] = start + places[:, 1:].T
        start += max(grid.rows, grid.columns)
        rows, row = rows[places.shape[0] :], end
    positions[:, row:] = np.arange(start, start + num_rows - row)
    return positions
