"""The model families, by Hugging Face's ``model_type``."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.models.internvl import InternvlConfig, InternvlModel
from edgeprune.models.llava import LlavaConfig, LlavaModel
from edgeprune.models.llava_next import LlavaNextConfig, LlavaNextModel
from edgeprune.models.qwen2_5_vl import Qwen25VlConfig, Qwen25VlModel
from edgeprune.models.qwen2_vl import Qwen2VlConfig, Qwen2VlModel
from edgeprune.models.qwen3_vl import Qwen3VlConfig, Qwen3VlModel
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
    # LLaVA's own code, see edgeprune.models.llava_layout.
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model."),
    (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower."),
    (r"^model\.mm_projector\.(?:0\.)?(?=weight$|bias$)", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    # transformers of all versions.
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)

_INTERNVL_RENAMES = (
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower\.encoder\.layer\.\d+)\.attention\.", r"\1.self_attn."),
)

_QWEN_RENAMES = (
    (r"^model\.(?=language_model\.|visual\.)", ""),
    # Before transformers 4.52 the decoder lay right in "model" and the tower beside it.
    (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model."),
)

FAMILIES: dict[str, Family] = {
    "llava": Family(lambda config: LlavaModel(LlavaConfig.from_huggingface(config)), _LLAVA_RENAMES),
    "llava_next": Family(
        lambda config: LlavaNextModel(LlavaNextConfig.from_huggingface(config)), _LLAVA_RENAMES
    ),
    "internvl": Family(
        lambda config: InternvlModel(InternvlConfig.from_huggingface(config)), _INTERNVL_RENAMES
    ),
    "qwen2_vl": Family(
        lambda config: Qwen2VlModel(Qwen2VlConfig.from_huggingface(config)),
        _QWEN_RENAMES,
    ),
    "qwen2_5_vl": Family(
        lambda config: Qwen25VlModel(Qwen25VlConfig.from_huggingface(config)),
        _QWEN_RENAMES,
    ),
    "qwen3_vl": Family(
        lambda config: Qwen3VlModel(Qwen3VlConfig.from_huggingface(config)),
        _QWEN_RENAMES,
    ),
}
