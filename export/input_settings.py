"""How a checkpoint's pictures and questions become its inputs: preprocessing, prompt format and tokenizer."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.export import llava_layout
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.export.prompt import prompt_format_from_checkpoint, tokenizer_json_from_checkpoint
from edgeprune.models.llava_layout import saved_by_llava
from edgeprune.runtimes.pictures import PicturePreprocessing
from edgeprune.runtimes.prompt import PromptEncoder, PromptFormat


@dataclass(frozen=True)
class InputSettings:
    """What a bundle stores of a checkpoint's processor.

    Attributes:
        preprocessing: Of pictures.
        prompt_format: How the model wants to be asked.
        tokenizer_json: The tokenizer, as the tokenizers library writes it.
    """

    preprocessing: PicturePreprocessing
    prompt_format: PromptFormat
    tokenizer_json: str

    @classmethod
    def from_checkpoint(
        cls, folder: Path, config: dict[str, Any], clip: str | Path | None = None
    ) -> "InputSettings":
        """Read the settings.

        Args:
            folder: The checkpoint.
            config: Its config.json, from :func:`edgeprune.checkpoint.read_config`.
            clip: Folder of the CLIP checkpoint that the vision tower comes from, if the user has given one.

        Raises:
            CheckpointError: A file is missing or damaged, or a setting is not supported.
        """
        if saved_by_llava(config):
            tokenizer_json = llava_layout.tokenizer_json_of(folder, config)
            return cls(
                llava_layout.preprocessing_of(folder, config, None if clip is None else Path(clip)),
                prompt_format_from_checkpoint(folder, config, tokenizer_json),
                tokenizer_json,
            )
        return cls(
            picture_preprocessing_from_checkpoint(folder, str(config["model_type"])),
            prompt_format_from_checkpoint(folder, config),
            tokenizer_json_from_checkpoint(folder),
        )

    def prompt_encoder(self) -> PromptEncoder:
        """What turns questions into ids."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_text(self.tokenizer_json, encoding="utf-8")
            return PromptEncoder(self.prompt_format, path)
