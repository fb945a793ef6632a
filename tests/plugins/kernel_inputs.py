"""Inputs of the operators, for the references on the host and the kernels on a GPU alike."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Few distinct values: ties, signed zeros, infinities and NaN meet often.
SCORES = np.array([0.0, -0.0, 0.25, 0.5, -1.0, np.inf, -np.inf, np.nan], dtype=np.float32)


@dataclass(frozen=True)
class AttentionCase:
    """Sizes of one AttentionScore; the letters are those of the operator."""

    B: int = 1
    H: int = 4
    Hkv: int = 4
    Q: int = 8  # rows in query; R of them score, in any order
    R: int = 8
    S: int = 8
    D: int = 8
    G: int = 1
    dtype: str = "float32"
    mode: str = "probabilities"
    causal: bool = True
    per_batch: bool = False
    spread: float = 1.0  # of query and key: how sharp the softmax is

    def inputs(self, seed: int) -> dict[str, Tensor | None]:
        """Random tensors; row_index is where the rows lie if the last row of query is the last key."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> Tensor:
            values = rng.standard_normal(shape, dtype=np.float32) * self.spread
            return torch.from_numpy(values).to(DTYPES[self.dtype])

        listed = self.R < self.Q
        rows = rng.choice(self.Q, size=self.R, replace=False) if listed else np.arange(self.Q)
        weight = (self.B, self.G, self.R) if self.per_batch else (self.G, self.R)
        return {
            "query": normal(self.B, self.H, self.Q, self.D),
            "key": normal(self.B, self.Hkv, self.S, self.D),
            "row_index": torch.from_numpy(np.maximum(rows + self.S - self.Q, 0).astype(np.int64)),
            "row_weight": torch.from_numpy(rng.random(weight, dtype=np.float32)),
            "query_rows": torch.from_numpy(rows.astype(np.int64)) if listed else None,
        }

    @property
    def scale(self) -> float:
        return self.D**-0.5

    def options(self) -> dict[str, object]:
        return {"scale": self.scale, "mode": self.mode, "causal": self.causal}


def attention_in_float64(case: AttentionCase, inputs: dict[str, Tensor | None]) -> np.ndarray:
    """The definition, with all the L×L matrices."""
    query, key, weight = (inputs[name].double().numpy() for name in ("query", "key", "row_weight"))
    if inputs["query_rows"] is not None:
        query = query[:, :, inputs["query_rows"].numpy()]
    keys = np.repeat(key, case.H // case.Hkv, axis=1)
    matrix = np.einsum("bhrd,bhjd->bhrj", query, keys) * case.scale
    if case.mode == "probabilities":
        if case.causal:
            hidden = np.arange(case.S) > inputs["row_index"].numpy()[:, None]
            matrix = np.where(hidden, -np.inf, matrix)
        matrix = np.exp(matrix - matrix.max(axis=-1, keepdims=True))
        matrix /= matrix.sum(axis=-1, keepdims=True)
    spec = "bgr,brj->bgj" if case.per_batch else "gr,brj->bgj"
    return np.einsum(spec, weight, matrix.mean(axis=1))


def random_scores(rng: np.random.Generator, *shape: int) -> Tensor:
    """Half of the draws from a handful of values, half from a continuum."""
    values = rng.choice(SCORES, size=shape)
    if rng.random() < 0.5:
        values = rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def random_droppable(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.random(shape) < rng.choice([0.0, 0.3, 0.9, 1.0]))


@dataclass(frozen=True)
class SoftNmsCase:
    """One or more pictures of tokens on a grid with random features, as AdaptPrune has them."""

    B: int = 1
    rows: int = 6
    columns: int = 6
    text: int = 3
    F: int = 8
    keep: tuple[int, ...] = (9,)
    dtype: str = "float32"
    reach: int = 5
    sigma: float = 0.5

    @property
    def S(self) -> int:  # noqa: N802 - the letter of the dimension
        return self.rows * self.columns + self.text

    def inputs(self, seed: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(seed)
        places = np.zeros((self.S, 2), np.int64)
        places[: self.S - self.text] = [(r, c) for r in range(self.rows) for c in range(self.columns)]
        droppable = np.arange(self.S) < self.S - self.text
        # A few directions with noise: some rows are much alike, most are not.
        kinds = rng.standard_normal((4, self.F))[rng.integers(0, 4, (self.B, self.S))]
        features = kinds + 0.3 * rng.standard_normal((self.B, self.S, self.F))
        squared = np.arange(self.reach**2 + 1)
        wide = 2 * (0.3 * max(self.reach, 1)) ** 2
        nearness = np.append(np.exp(-squared / wide), 0.0).astype(np.float32)
        return {
            "scores": torch.from_numpy(rng.random((self.B, self.S), dtype=np.float32)),
            "num_keep": torch.tensor(self.keep, dtype=torch.int64),
            "droppable": torch.from_numpy(np.tile(droppable, (self.B, 1))),
            "features": torch.from_numpy(features.astype(np.float32)).to(DTYPES[self.dtype]),
            "places": torch.from_numpy(np.tile(places, (self.B, 1, 1))),
            "nearness": torch.from_numpy(nearness),
        }


def soft_nms_in_float64(inputs: dict[str, Tensor], entry: int, sigma: float) -> tuple[list[int], float]:
    """The kept droppable rows in the order of choice, and the least relative lead of a choice over the next best."""
    score = inputs["scores"][entry].double().numpy().copy()
    open_rows = inputs["droppable"][entry].numpy().copy()
    features = inputs["features"][entry].double().numpy()
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    places, nearness = inputs["places"][entry].numpy(), inputs["nearness"].double().numpy()
    kept, margin = [], np.inf
    for _ in range(min(max(int(inputs["num_keep"][entry]), 0), int(open_rows.sum()))):
        order = np.flatnonzero(open_rows)
        order = order[np.argsort(-score[order], kind="stable")]
        chosen = int(order[0])
        if len(order) > 1:
            margin = min(margin, float((score[chosen] - score[order[1]]) / max(abs(score[chosen]), 1e-30)))
        kept.append(chosen)
        open_rows[chosen] = False
        squared = ((places - places[chosen]) ** 2).sum(axis=1)
        near = nearness[np.minimum(squared, len(nearness) - 1)]
        unlike = 1 - directions @ directions[chosen]
        score *= 1 - near * np.exp(-0.5 / sigma**2 * unlike**2)
    return kept, margin


@dataclass(frozen=True)
class DppCase:
    """Kernels of features of one or more groups, as CDPruner makes them."""

    B: int = 1
    S: int = 40
    F: int = 12
    groups: int = 2
    text: float = 0.2
    keep: tuple[int, ...] = (9,)
    group_keep: tuple[int, ...] = (6, 30)

    def inputs(self, seed: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(seed)
        features = rng.standard_normal((self.B, self.S, self.F))
        features /= np.linalg.norm(features, axis=2, keepdims=True)
        relevance = 0.2 + 0.8 * rng.random((self.B, self.S))
        kernel = np.einsum("bif,bjf->bij", features, features)
        kernel *= relevance[:, :, None] * relevance[:, None, :]
        groups = rng.integers(0, self.groups, (self.B, self.S))
        return {
            "kernel": torch.from_numpy(kernel.astype(np.float32)),
            "num_keep": torch.tensor(self.keep),
            "droppable": torch.from_numpy(rng.random((self.B, self.S)) >= self.text),
            "groups": torch.from_numpy(10 * groups - 10),
            "group_keep": torch.from_numpy(np.array(self.group_keep)[groups]),
        }


def dpp_in_float64(inputs: dict[str, Tensor], b: int) -> tuple[list[int], float]:
    """The rows that are kept, each step by solving anew for what the kept rows explain, and the least lead in steps."""
    kernel = inputs["kernel"][b].double().numpy()
    droppable, groups, room = (inputs[name][b].numpy() for name in ("droppable", "groups", "group_keep"))
    kept: list[int] = []
    explaining: list[int] = []
    margin = np.inf
    for _ in range(int(inputs["num_keep"][b])):
        gains = {}
        for i in np.flatnonzero(droppable):
            own = [k for k in kept if groups[k] == groups[i]]
            if i in kept or len(own) >= room[i]:
                continue
            basis = [k for k in explaining if groups[k] == groups[i]]
            part = kernel[np.ix_(basis, basis)] + 1e-6 * np.eye(len(basis))
            across = kernel[i, basis]
            gains[i] = kernel[i, i] - (across @ np.linalg.solve(part, across) if basis else 0.0)
        if not gains:
            break
        steps = {i: max(0.0, float(np.rint(gain * 65536))) for i, gain in gains.items()}
        chosen = max(steps, key=lambda i: (steps[i], -i))
        others = [gains[chosen] * 65536 - gains[i] * 65536 for i in steps if i != chosen]
        margin = min([margin, *others])
        kept.append(int(chosen))
        if steps[chosen] > 0:
            explaining.append(int(chosen))
    return kept, margin
