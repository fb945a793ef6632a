"""What the last row of the prompt attends to: the score of FastV and of the methods built on it."""

import math

import torch
from torch import Tensor

from edgeprune.operators.attention_score import attention_score


def last_row_attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the last row to every row, averaged over heads.

    Shapes:
        query: [1, H, R, D], of any rows up to the last; key: [1, Hkv, S, D], both after rotary embedding.
        returns: [S] float32.
    """
    length = key.shape[2]
    last = torch.arange(length - 1, length, device=query.device)
    one = torch.ones(1, 1, device=query.device)
    score = attention_score(query[:, :, -1:], key, last, one, scale=1 / math.sqrt(query.shape[-1]))
    return score[0, 0]
