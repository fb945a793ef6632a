"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: configurations of all versions, and the model round the tower."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from edgeprune.errors import CheckpointError, PruningError
from edgeprune.models.clip import FeaturePruner
from edgeprune.models.config_fields import read_field
from edgeprune.models.llama import LlamaConfig
from edgeprune.models.qwen3_vision import Qwen3VisionTower
from edgeprune.models.qwen_vision import QwenVisionConfig, QwenVisionTower
from edgeprune.models.vision_language import TowerFeatures, TowerShape, TypicalPicture, VisionLanguageModel
from edgeprune.models.vision_pruning import VisionPruner
from edgeprune.positions import MULTIMODAL
from edgeprune.prune.method import ModelGeometry

# A picture of 448 × 448 pixels, with Qwen3-VL 512 × 512: learned heads of methods are made for this grid, reports
# count with it.
TYPICAL_GRID = (16, 16)

# What transformers assumes for the fields that a config.json leaves out.
_IMAGE_TOKEN_ID = 151655


@dataclass(frozen=True)
class TextDefaults:
    """What transformers assumes of a decoder.

    Attributes:
        fields: By name in ``text_config``.
        rope_theta: Base of the rotary embedding.
        mrope_section: Frequencies for time, row and column.
    """

    fields: Mapping[str, Any]
    rope_theta: float
    mrope_section: tuple[int, int, int]


_QWEN2_TEXT = TextDefaults(
    fields={
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    },
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
)


ConfigT = TypeVar("ConfigT", bound="QwenVlConfig")


@dataclass(frozen=True)
class QwenVlConfig:
    """A checkpoint of one of the families; each has a subclass that reads its tower.

    Attributes:
        vision: The vision tower.
        mlp_matrices: Matrices of the tower's MLP.
        decoder: The decoder.
        image_token_id: Placeholder token of a visual token.
    """

    vision: QwenVisionConfig
    mlp_matrices: int
    decoder: LlamaConfig
    image_token_id: int

    text_defaults: ClassVar[TextDefaults] = _QWEN2_TEXT

    def __post_init__(self) -> None:
        if self.vision.output_size != self.decoder.hidden_size:
            raise CheckpointError(
                f"config.json: the vision tower gives {self.vision.output_size} values per visual token, the decoder "
                f"takes {self.decoder.hidden_size}: one of the two sections belongs to another checkpoint"
            )
        if not self.decoder.mrope_section or len(self.decoder.mrope_section) != 3:
            raise CheckpointError(
                f"text_config: 'mrope_section' is {list(self.decoder.mrope_section)}, expected three numbers: "
                "frequencies for time, row and column"
            )

    @classmethod
    def of(
        cls: type[ConfigT], config: Mapping[str, Any], vision: QwenVisionConfig, mlp_matrices: int
    ) -> ConfigT:
        """Read what is not about the tower from a ``config.json``.

        Args:
            config: The file.
            vision: The tower, read by the family.
            mlp_matrices: Matrices of the tower's MLP.

        Raises:
            CheckpointError: A field is missing or a variant is not supported.
        """
        text = _text_section(config, cls.text_defaults)
        tied = bool(config.get("tie_word_embeddings", False)) or bool(text.get("tie_word_embeddings", False))
        return cls(
            vision=vision,
            mlp_matrices=mlp_matrices,
            decoder=LlamaConfig.from_huggingface(text, tie_word_embeddings=tied),
            image_token_id=read_field(config, "image_token_id", int, _IMAGE_TOKEN_ID),
        )

    @property
    def geometry(self) -> ModelGeometry:
        """What pruning methods need to know."""
        return ModelGeometry(
            num_layers=self.decoder.num_layers,
            hidden_size=self.decoder.hidden_size,
            num_heads=self.decoder.num_heads,
            head_dim=self.decoder.head_dim,
            grid=TYPICAL_GRID,
            vision_layers=self.vision.num_layers,
            has_class_token=False,
            one_tile=False,
            one_grid=False,
            fixed_tiles=False,
            patches_per_token=self.vision.patches_per_token,
            has_clip_tower=False,
            positions=MULTIMODAL,
        )

    @property
    def feature_size(self) -> int:
        """Width of a visual token between tower and projector: that of its patches, side by side."""
        return self.vision.joined_size

    @property
    def tower_shape(self) -> TowerShape:
        """The vision tower's sizes."""
        return TowerShape(
            hidden_size=self.vision.hidden_size,
            intermediate_size=self.vision.intermediate_size,
            mlp_matrices=self.mlp_matrices,
            class_tokens=0,
            window=self.vision.window_patches,
            global_layers=self.vision.global_layers,
            projector_sizes=(self.vision.joined_size, self.vision.joined_size, self.decoder.hidden_size),
        )

    @property
    def typical_picture(self) -> TypicalPicture:
        """A picture of the grid of ``geometry``."""
        return TypicalPicture(tiles=1, tokens=self.geometry.num_patches)


def vision_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``vision_config`` of a ``config.json``.

    Raises:
        CheckpointError: There is none, or it is for patches that are not RGB.
    """
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise CheckpointError("config.json lacks 'vision_config': is this a whole Qwen-VL checkpoint?")
    # Published checkpoints call it in_chans.
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    if channels != 3:
        raise CheckpointError(f"vision_config: 'in_channels' is {channels!r}, supported: 3")
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default") or rope.get("rope_theta", 1e4) != 1e4:
        raise CheckpointError(
            f"vision_config: 'rope_parameters' is {dict(rope)}, supported: axial, theta 10000"
        )
    return vision


def _text_section(config: Mapping[str, Any], defaults: TextDefaults) -> dict[str, Any]:
    """The decoder's fields: a section of their own since transformers 4.52, in published files beside the others."""
    nested = config.get("text_config")
    text = dict(nested) if isinstance(nested, Mapping) else dict(config)
    text["model_type"] = f"{config.get('model_type')}_text"
    text = {**defaults.fields, **text}
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("mrope_section", list(defaults.mrope_section))
    theta = text.get("rope_theta")
    rope.setdefault("rope_theta", defaults.rope_theta if theta is None else theta)
    text["rope_parameters"] = rope
    return text


class QwenVlModel(VisionLanguageModel):
    """The whole model, unpruned."""

    config: QwenVlConfig

    def __init__(self, config: QwenVlConfig, visual: QwenVisionTower | Qwen3VisionTower) -> None:
        super().__init__(config)
        self.vision_inputs = config.vision.inputs
        self.visual = visual

    def encode(
        self,
        inputs: Mapping[str, Tensor],
        *,
        pruner: VisionPruner | None = None,
        feature_pruner: FeaturePruner | None = None,
        pooled: bool = False,
    ) -> TowerFeatures:
        """Turn the patches of all pictures into one row of visual tokens.

        Raises:
            PruningError: A method wants to drop tokens in the tower.
        """
        if pruner is not None or feature_pruner is not None or pooled:
            raise PruningError(
                "the vision tower of this family cannot be pruned: use a method that drops tokens in the decoder"
            )
        hidden = self.visual(inputs)
        features = hidden.reshape(1, -1, self.config.feature_size)
        slots = torch.arange(features.shape[1], device=hidden.device).unsqueeze(0)
        return TowerFeatures(features, slots, None, None, None)

    def project(self, features: Tensor) -> Tensor:
        """[…, merge² · Cv] → […, C]."""
        projected: Tensor = self.visual.merger(features)
        return projected
