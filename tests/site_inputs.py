"""Random inputs of a site, of the kinds that selection can stumble over."""

from dataclasses import replace

import numpy as np
import torch

from edgeprune import tensor_names as names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.runtimes.layout import SequenceLayout
from edgeprune.stages import SelectStage
from edgeprune.visual_layout import VisualGrid, VisualLayout

KINDS = ("random", "sparse", "ties", "equal", "one token", "peaked")
WHOLE_PICTURES = ("random", "ties", "equal", "peaked")


def random_site_inputs(stage: SelectStage, seed: int, *, grid=(6, 6), dtype=torch.float32):
    """Inputs of one site by name, as torch tensors.

    Seeds go through the kinds: all tokens there, some there, tokens that equal each other, attention that is equal
    for all, one token left, attention on few tokens. Pictures are one to three, text is of any length. A site that
    merges tokens counts on those that the site before it left, and gets whole pictures of different tokens.
    """
    rng = np.random.default_rng(seed)
    merges = stage.planned.site.merged_per_image > 0
    kinds = WHOLE_PICTURES if merges else KINDS
    kind = kinds[seed % len(kinds)]
    num_patches = grid[0] * grid[1]
    num_images = 1 if kind == "one token" else int(rng.integers(1, 4))
    slots = [-1] * int(rng.integers(1, 4))
    for image in range(num_images):
        share = 1.0 if kind != "sparse" else float(rng.uniform(0.1, 0.9))
        alive = np.flatnonzero(rng.random(num_patches) < share)
        if kind == "one token" or not len(alive):
            alive = rng.integers(num_patches, size=1)
        slots += [int(slot) + image * num_patches for slot in alive] + [-1] * int(rng.integers(0, 2))
    num_text = int(rng.integers(1, 6))
    slots = np.array([*slots, *[-1] * num_text], dtype=np.int64)
    while slots[-num_text - 1] < 0:
        num_text += 1
    visual_layout = layout_of([grid] * num_images)
    layout = SequenceLayout(len(slots), num_text, int((slots >= 0).sum()), 0, visual_layout)
    prompt_slots = np.array([-1, *range(num_images * num_patches), *[-1] * num_text], dtype=np.int64)
    layout = replace(layout, num_prompt_rows=len(prompt_slots))
    visual = np.flatnonzero(slots >= 0)

    inputs = {}
    for spec in stage.inputs:
        if spec.name == names.VISUAL_SLOTS:
            inputs[spec.name] = torch.from_numpy(slots)
        elif spec.name == names.PROMPT_SLOTS:
            inputs[spec.name] = torch.from_numpy(prompt_slots)
        elif spec.name == names.POSITION_IDS:
            # Rows that earlier sites dropped have left gaps.
            gaps = rng.integers(1, 3, size=len(slots)).cumsum()
            inputs[spec.name] = torch.from_numpy(gaps[None])
        elif spec.dtype == "int64":
            inputs[spec.name] = torch.from_numpy(layout.host_input(spec.name, stage.planned.site))
        else:
            sizes = {"sequence": len(slots), "prompt": len(prompt_slots)}
            shape = [sizes.get(size, size) for size in spec.shape]
            values = rng.standard_normal(shape) * (4.0 if kind == "peaked" else 1.0)
            axis = spec.shape.index("sequence") if "sequence" in spec.shape else None
            attention = not spec.name.endswith(names.HIDDEN_STATES)
            tied = attention if merges or kind == "equal" else True
            if axis is not None and kind in ("ties", "equal") and tied:
                values = _repeat_rows(values, axis, visual, 3 if kind == "ties" else 1)
            inputs[spec.name] = torch.from_numpy(values).to(dtype)
    return inputs


def layout_of(grids) -> VisualLayout:
    """Pictures of one grid each, [(rows, columns), …]."""
    box = (0.0, 0.0, 1.0, 1.0)
    return VisualLayout.of_whole_grids([VisualGrid(i, *grid, box) for i, grid in enumerate(grids)])


def _repeat_rows(values, axis, rows, different):
    """The visual rows, with only so many different ones among them."""
    values = np.moveaxis(values, axis, 0).copy()
    values[rows] = values[rows[np.arange(len(rows)) % different]]
    return np.moveaxis(values, 0, axis)


def site_of(folder, method):
    """The only site of a method on a checkpoint."""
    (stage,) = load_checkpoint(folder, methods=[method]).selects
    return stage


def kept_rows(stage, inputs):
    """Kept visual rows, ascending; all of the text must be there."""
    with torch.no_grad():
        chosen = stage(inputs)
    order = chosen[names.KEEP_INDICES].numpy()
    kept = order[: int(chosen[names.KEEP_COUNT])]
    assert sorted(order) == list(range(len(order)))
    assert list(kept) == sorted(kept)
    visual = inputs[names.VISUAL_SLOTS].numpy() >= 0
    assert set(np.flatnonzero(~visual)) <= set(kept)
    return [row for row in kept if visual[row]]
