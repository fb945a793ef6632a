"""AttentionScore: weighted column sums of attention, without an L×L matrix.

Torch reference of the operator; the ONNX function is ``edgeprune.export.operators.attention_score``.

The last row (FastV), the text rows (SparseVLM, ATP), the CLS row (EViT, PruMerge) and a propagated row
(IVTP's rollout) are all cases of it: only the rows that are given are computed.
"""

import torch
from torch import Tensor

from edgeprune.errors import PruningError
from edgeprune.operators.schema import ATTENTION_SCORE_MODES, LOGITS, PROBABILITIES


def attention_score(
    query: Tensor,
    key: Tensor,
    row_index: Tensor,
    row_weight: Tensor,
    *,
    scale: float,
    mode: str = PROBABILITIES,
    causal: bool = True,
) -> Tensor:
    """Weighted sums over query rows of the attention that each key receives, averaged over heads.

    ``score[b, g, j] = Σ_r row_weight[g, r] · mean_h P[b, h, r, j]`` with ``P = softmax_j(scale · q_r · k_j)``
    in mode ``probabilities`` and ``P = scale · q_r · k_j`` (no mask, no softmax) in mode ``logits``.
    Everything is computed in float32, whatever the type of ``query`` and ``key``. Query head h uses key head
    ``h // (H / Hkv)``.

    Shapes:
        query: [B, H, R, D] float32, float16 or bfloat16; the R rows that score, not the whole sequence
        key: [B, Hkv, S, D], the type of query
        row_index: [R] int64, position of each row among the S keys, from 0
        row_weight: [G, R] float32, or [B, G, R] with weights of its own for each batch entry
        returns: [B, G, S] float32

    Args:
        query: The query rows, after rotary embedding.
        key: The keys of the whole sequence, after rotary embedding.
        row_index: Keys behind it are excluded in mode ``probabilities`` if ``causal``; not read otherwise.
        row_weight: G weightings of the rows.
        scale: The factor of the logits, 1/√D in most models.
        mode: ``probabilities`` or ``logits``.
        causal: Whether a row sees only the keys up to its own position.

    Raises:
        PruningError: The mode is unknown or the shapes do not fit each other.
    """
    if mode not in ATTENTION_SCORE_MODES:
        raise PruningError(f"unknown mode {mode!r} of attention_score: use one of {ATTENTION_SCORE_MODES}")
    score: Tensor = _attention_score(query, key, row_index, row_weight, scale, mode, causal)
    return score


@torch.library.custom_op("edgeprune::attention_score", mutates_args=())
def _attention_score(
    query: Tensor, key: Tensor, row_index: Tensor, row_weight: Tensor, scale: float, mode: str, causal: bool
) -> Tensor:
    _check(query, key, row_index, row_weight)
    B, H, R, D = query.shape
    Hkv, S = key.shape[1], key.shape[2]
    key_t = key.float().transpose(2, 3)
    if mode == LOGITS:
        # The sum over rows commutes with the product: weight the queries first, and no row has R×S logits.
        weighted = torch.matmul(row_weight.float().unsqueeze(-3), query.float())  # [B, H, G, D]
        per_key_head = weighted.reshape(B, Hkv, H // Hkv, -1, D).sum(dim=2)
        return torch.matmul(per_key_head, key_t).sum(dim=1) * (scale / H)
    # The query heads of one key head are more rows of the same product: keys are never repeated.
    rows = (query.float() * scale).reshape(B, Hkv, H // Hkv * R, D)
    logits = torch.matmul(rows, key_t).reshape(B, H, R, S)
    if causal:
        hidden = torch.arange(S, device=key.device) > row_index[:, None]  # [R, S]
        logits = logits.masked_fill(hidden, -torch.inf)
    return torch.matmul(row_weight.float(), logits.softmax(dim=-1).mean(dim=1))


@_attention_score.register_fake
def _attention_score_fake(
    query: Tensor, key: Tensor, _row_index: Tensor, row_weight: Tensor, *_: object
) -> Tensor:
    shape = (query.shape[0], row_weight.shape[-2], key.shape[2])
    return query.new_empty(shape, dtype=torch.float32)


def _check(query: Tensor, key: Tensor, row_index: Tensor, row_weight: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4 or row_index.dim() != 1 or row_weight.dim() not in (2, 3):
        raise PruningError(
            "attention_score takes query [B, H, R, D], key [B, Hkv, S, D], row_index [R] and row_weight "
            f"[G, R] or [B, G, R]; got {list(query.shape)}, {list(key.shape)}, {list(row_index.shape)} and "
            f"{list(row_weight.shape)}"
        )
    B, H, R, D = query.shape
    if key.shape[0] != B or key.shape[3] != D or H % key.shape[1] != 0:
        raise PruningError(
            f"query {list(query.shape)} and key {list(key.shape)} must agree in batch and head size, and the "
            "number of query heads must be a multiple of the number of key heads"
        )
    if row_weight.dim() == 3 and row_weight.shape[0] != B:
        raise PruningError(f"row_weight {list(row_weight.shape)} must have {B} batch entries, as query has")
    if row_index.shape[0] != R or row_weight.shape[-1] != R:
        raise PruningError(
            f"query has {R} rows, row_index {row_index.shape[0]} and row_weight {row_weight.shape[-1]}: "
            "give one index and one weight per row"
        )
