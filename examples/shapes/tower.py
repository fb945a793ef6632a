"""Stage one: the vision tower, from dense labels and a contrastive loss at the same time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from muon import Optimizer
from scenes import (
    CHARACTERS,
    COLORS,
    GRID,
    IMAGE_SIZE,
    PATCH_SIZE,
    SHAPES,
    SIZES,
    Scene,
    dense_labels,
    describe,
    draw_scene,
    render,
)
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WIDTH = 128


def pixels(scenes: list[Scene]) -> Tensor:
    """Normalised pictures, exactly as the image processor makes them."""
    raw = np.stack([np.asarray(render(scene)) for scene in scenes])
    return normalise(torch.from_numpy(raw))


def normalise(raw: Tensor) -> Tensor:
    """From uint8 NHWC to normalised float NCHW."""
    scaled = raw.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """A tiny CLIP: the vision tower that LLaVA will use, and a smaller text tower."""
    return CLIPConfig(
        projection_dim=64,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 77,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
    )


class DenseHeads(nn.Module):
    """Reads every label off every patch; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [1 + len(COLORS), 1 + len(SHAPES), 1 + len(SIZES), 2 + len(CHARACTERS), 2]
        self.sizes = [*kinds, 2, GRID, GRID, 2, 2]
        self.norm = nn.LayerNorm(WIDTH)
        self.read = nn.Linear(WIDTH, sum(self.sizes))

    def forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        """Read everything.

        Logits of colour, shape, size, character and centre; the offset to the centre; logits of the
        patch's own row and column; the place of the centre; logits of the background.
        """
        read: Tensor = self.read(self.norm(patches))
        return torch.split(read.float(), self.sizes, dim=-1)


Batch = tuple[Tensor, Tensor, Tensor, Tensor, list[str]]


class TowerBatches(torch.utils.data.Dataset[Batch]):
    """Batch ``i`` is a function of the seed and ``i``."""

    def __init__(self, seed: int, batches: int, size: int) -> None:
        self.seed, self.batches, self.size = seed, batches, size

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"tower {self.seed} {index}")
        scenes = [draw_scene(rng) for _ in range(self.size)]
        labels = [dense_labels(s) for s in scenes]
        classes = np.stack([np.stack([d.color, d.shape, d.size, d.character, d.centre]) for d in labels])
        offsets = np.stack([d.offset for d in labels])
        raw = np.stack([np.asarray(render(s)) for s in scenes])
        # Captions in a random order, so that the text tower does not learn positions only.
        captions = []
        for scene in scenes:
            parts = describe(scene).split(", ")
            captions.append(", ".join(rng.sample(parts, len(parts))))
        dark = torch.tensor([float(s.background == "dark") for s in scenes])
        return torch.from_numpy(raw), torch.from_numpy(classes), torch.from_numpy(offsets), dark, captions


def dense_loss(outputs: tuple[Tensor, ...], classes: Tensor, offsets: Tensor) -> tuple[Tensor, list[float]]:
    """Weighted cross entropies and the offset's error; accuracies on object patches."""
    on_object = classes[:, 0] > 0
    weight = torch.where(on_object, 1.0, 0.25)
    loss = torch.zeros(())
    accuracies = []
    for index, (logits, factor) in enumerate(zip(outputs[:5], (1.0, 1.0, 1.0, 2.0, 1.0), strict=True)):
        target = classes[:, index]
        entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        loss = loss + factor * (entropy * weight).sum() / weight.sum()
        right = (logits.argmax(-1) == target).float()
        mask = target > 1 if index == 3 else on_object
        accuracies.append(right[mask].mean().item())
    error = (outputs[5] - offsets).abs().sum(-1)[on_object].mean()
    accuracies.append(error.item())
    return loss + 0.5 * error, accuracies


def place_loss(outputs: tuple[Tensor, ...], offsets: Tensor, dark: Tensor, on_object: Tensor) -> Tensor:
    """Where a patch is, where its object's centre is, and what the background is.

    Without it the tower forgets absolute positions: the other labels do not need them.
    """
    rows, columns, place, background = outputs[6:]
    at = torch.arange(GRID * GRID)
    row, column = (at // GRID).expand(len(dark), -1), (at % GRID).expand(len(dark), -1)
    loss = F.cross_entropy(rows.flatten(0, 1), row.flatten())
    loss = loss + F.cross_entropy(columns.flatten(0, 1), column.flatten())
    loss = loss + F.cross_entropy(background.flatten(0, 1), dark.long()[:, None].expand_as(row).flatten())
    here = torch.stack([column, row], dim=-1) + 0.5
    centre = torch.where(on_object[..., None], here + offsets, here) - GRID / 2
    return 0.5 * loss + 0.5 * (place - centre).abs().sum(-1).mean()


def train_tower(
    tokenizer: CLIPTokenizer,
    *,
    seed: int,
    steps: int,
    size: int = 64,
    log: Callable[[str], None] = print,
) -> CLIPModel:
    """Train the CLIP model; dense labels are read from the layer that LLaVA reads."""
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(tokenizer))
    model.set_attn_implementation("eager")  # its backward pass is several times faster on a CPU
    heads = DenseHeads()
    optimizer = Optimizer([model, heads], steps)
    data = TowerBatches(seed, steps, size)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=8)
    started = time.monotonic()
    for step, (raw, classes, offsets, dark, captions) in enumerate(loader):
        text = tokenizer(captions, return_tensors="pt", padding=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vision = model.vision_model(pixel_values=normalise(raw), output_hidden_states=True)
            outputs = heads(vision.hidden_states[-2][:, 1:])
            written = model.text_model(**text).pooler_output
            image_vector = F.normalize(model.visual_projection(vision.pooler_output).float(), dim=-1)
            text_vector = F.normalize(model.text_projection(written).float(), dim=-1)
        dense, accuracies = dense_loss(outputs, classes, offsets)
        places = place_loss(outputs, offsets, dark, classes[:, 0] > 0)
        logits = model.logit_scale.exp().clamp(max=100) * image_vector @ text_vector.T
        own = torch.arange(len(raw))
        contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        torch.autograd.backward(dense + places + 0.5 * contrast)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            found = (logits.argmax(-1) == own).float().mean().item()
            shown = " ".join(f"{a:.3f}" for a in accuracies)
            log(
                f"tower {step:5d} {time.monotonic() - started:6.0f}s dense {dense.item():.3f} "
                f"place {places.item():.3f} "
                f"contrast {contrast.item():.3f} found {found:.2f} | {shown}"
            )
    return model.eval()
