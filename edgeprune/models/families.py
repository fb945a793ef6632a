"""The model families, by Hugging Face's ``model_type``."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.models import qwen2_5_vl, qwen2_vl
from edgeprune.models.llava import LlavaConfig, LlavaModel
from edgeprune.models.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class Family:
    """How checkpoints of one family are read.

    Attributes:
        build: From a ``config.json`` to a model without weights.
        renames: Patterns and replacements that bring the weights' names of every transformers version to the model's;
            applied one after the other.
    """

    build: Callable[[Mapping[str, Any]], VisionLanguageModel]
    renames: tuple[tuple[str, str], ...]

    def canonical_name(self, name: str) -> str:
        """A weight's name without what depends on the transformers version that saved it."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


_LLAVA_RENAMES = (
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)

_QWEN_RENAMES = (
    (r"^model\.(?=language_model\.|visual\.)", ""),
    # Before transformers 4.52 the decoder lay right in "model" and the tower beside it.
    (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model."),
)

FAMILIES: dict[str, Family] = {
    "llava": Family(lambda config: LlavaModel(LlavaConfig.from_huggingface(config)), _LLAVA_RENAMES),
    "qwen2_vl": Family(
        lambda config: qwen2_vl.Qwen2VlModel(qwen2_vl.read_config(config)),
        _QWEN_RENAMES,
    ),
    "qwen2_5_vl": Family(
        lambda config: qwen2_5_vl.Qwen25VlModel(qwen2_5_vl.read_config(config)),
        _QWEN_RENAMES,
    ),
}
