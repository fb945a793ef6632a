"""IVTP's choice of instruction tokens: CLIP's text tower against the picture (Eq. 5-8)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import tensor_names
from edgeprune.models.clip import ClipTextTower


class IvtpGuide(nn.Module):
    """Chooses the text rows that the pseudo-CLS token averages.

    A text token's relevance is the mean cosine of the CLIP tokens that cover its characters (Eq. 7) with the picture's
    embedding; tokens at or above the threshold are averaged (Eq. 8). If none is, the pseudo-CLS token is the pictures'
    class token, brought into the decoder's space by the projector.
    """

    def __init__(self, text_tower: ClipTextTower, text_projection: nn.Linear, threshold: float) -> None:
        super().__init__()
        self.text_tower = text_tower
        self.text_projection = text_projection
        self.threshold = threshold

    def relevance(self, input_ids: Tensor, token_map: Tensor, image_embeds: Tensor) -> Tensor:
        """Relevance of each text row to the picture it fits best, [T] float32.

        Shapes:
            input_ids: [Q, 77]; token_map: [T, Q·77] float32; image_embeds: [M, E].
        """
        text = F.normalize(self.text_projection(self.text_tower(input_ids)).float().flatten(0, 1), dim=-1)
        cosine = text @ F.normalize(image_embeds.float(), dim=-1).T
        return (token_map @ cosine).amax(dim=1)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights [1, S] and the offset [1, C] of the pseudo-CLS token."""
        token_map = inputs[tensor_names.GUIDE_TOKEN_MAP]
        relevance = self.relevance(
            inputs[tensor_names.GUIDE_INPUT_IDS], token_map, inputs[tensor_names.IMAGE_EMBEDS]
        )
        # A row that no CLIP token covers (a line break, say) is never relevant.
        selected = ((relevance >= self.threshold) & (token_map.sum(dim=1) > 0)).float()
        count = selected.sum()
        weights = torch.zeros_like(inputs[tensor_names.VISUAL_SLOTS], dtype=torch.float32)
        weights = weights.scatter(0, inputs[tensor_names.TEXT_ROWS], selected / count.clamp(min=1))
        fallback = inputs[tensor_names.CLASS_FEATURES].mean(dim=0)
        offset = torch.where(count > 0, torch.zeros_like(fallback), fallback)
        return {
            tensor_names.PROBE_WEIGHTS: weights.unsqueeze(0),
            tensor_names.PROBE_OFFSET: offset.unsqueeze(0),
        }
