"""DeepStack: features of inner layers of the vision tower are added to the visual rows behind the first decoder layers.

Behind decoder layer j (its MLP) every visual row gets the j-th feature of its visual token; rows of text get nothing.
The features lie in rows like the hidden states, so that they are gathered with them where tokens are dropped.

Meng et al., "DeepStack: Deeply Stacking Visual Tokens is Surprisingly Simple and Effective for LMMs" (2024), §3.2.
"""

import torch
from torch import Tensor


def features_by_row(features: Tensor, visual_slots: Tensor) -> Tensor:
    """Lay the features of visual tokens into the rows of the sequence.

    Shapes:
        features: [J, N, C], in the order of the prompt; visual_slots: [S] int64, -1 for text.
        returns: [J, S, C], zeros for text.
    """
    is_visual = visual_slots >= 0
    order = (is_visual.to(torch.int64).cumsum(dim=0) - 1).clamp(min=0)
    return torch.where(is_visual[None, :, None], features.index_select(1, order), 0.0)
