"""Decoders to measure: transformers' and a bundle's, from hidden states to the logits of the last row on the host.

A bundle's graphs take one sequence (docs/architecture.md), so it answers a batch one request after the other.
"""

import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from random_llava import LlavaSize
from transformers import DynamicCache, LlavaForConditionalGeneration

from edgeprune.bundle import Bundle
from edgeprune.cost import DecoderShape, decoder_prefill_flops, layer_rows
from edgeprune.runtimes.backend import open_graphs
from edgeprune.runtimes.graph_chain import GraphChain, Sequence, Stopwatch
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.pictures import PreparedPictures

PREFIX_TOKENS = 6
TEXT_TOKENS = 64
DECODE_STEPS = 8
ANY_TOKEN = 9


@dataclass(frozen=True)
class RandomPrompt:
    """Random pictures and text of given lengths, always the same.

    Attributes:
        size: Of the model.
        image_token: Its placeholder.
        num_pictures: Pictures, one after the other behind the first ``PREFIX_TOKENS`` tokens; may be 0.
        text_tokens: Tokens of text.
    """

    size: LlavaSize
    image_token: int
    num_pictures: int = 1
    text_tokens: int = TEXT_TOKENS

    @property
    def rows(self) -> int:
        """Of the unpruned prompt."""
        return self.num_pictures * self.size.visual_tokens + self.text_tokens

    def token_ids(self, visual_tokens: int) -> NDArray[np.int64]:
        """The prompt [S] with a placeholder per visual token."""
        text = np.random.default_rng(0).integers(10, 250, self.text_tokens)
        placeholders = np.full(visual_tokens, self.image_token)
        return np.concatenate([text[:PREFIX_TOKENS], placeholders, text[PREFIX_TOKENS:]]).astype(np.int64)

    def pixels(self) -> NDArray[np.float32]:
        """The pictures [M, 3, height, width], resized and normalised."""
        shape = (self.num_pictures, 3, self.size.image_size, self.size.image_size)
        return np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def pictures(self) -> PreparedPictures:
        """The pictures as a vision graph takes them."""
        side = self.size.image_size // self.size.patch_size
        return PreparedPictures.of_whole_tiles(self.pixels(), (side, side))


def prompt_of_rows(size: LlavaSize, image_token: int, rows: int) -> RandomPrompt:
    """A prompt of so many rows: as many pictures as leave room for ``TEXT_TOKENS`` of text, the rest text."""
    pictures = max(0, rows - TEXT_TOKENS) // size.visual_tokens
    return RandomPrompt(size, image_token, pictures, rows - pictures * size.visual_tokens)


def open_chain(bundle: Path, provider: str = "cpu") -> GraphChain:
    """Open every graph of a bundle with ONNX Runtime."""
    opened, backend = Bundle.open(bundle), OnnxRuntimeBackend(provider)
    return GraphChain(opened.manifest, backend, open_graphs(opened, backend))


@dataclass
class BundleDecoder:
    """A bundle's decoder on one prompt, whose pictures have been through the tower.

    Attributes:
        chain: The opened bundle.
        prompt: What it is asked.
        max_new_tokens: Room in its caches for generated tokens.
        sequence: Of the latest prefill.
    """

    chain: GraphChain
    prompt: RandomPrompt
    max_new_tokens: int = DECODE_STEPS
    sequence: Sequence = field(init=False)

    def __post_init__(self) -> None:
        tower = None
        if self.prompt.num_pictures:
            tower = self.chain.encode_pictures(self.prompt.pictures(), Stopwatch())
        self._tower = tower
        self._entering = 0 if tower is None else sum(tower.rows.tokens_per_image)
        self._token_ids = self.prompt.token_ids(self._entering)

    def stages(self) -> dict[str, float]:
        """Run the prompt; milliseconds of every segment, selection and gather."""
        watch = Stopwatch()
        _, self.sequence = self.chain.prefill(self._token_ids, self._tower, None, self.max_new_tokens, watch)
        return {
            name: ms
            for name, ms in watch.milliseconds.items()
            if name.startswith(("prefill", "select", "gather"))
        }

    def prefill(self) -> float:
        """Run the prompt; milliseconds."""
        return sum(self.stages().values())

    def step(self) -> float:
        """Milliseconds of one generated token."""
        start = time.perf_counter()
        self.chain.decode(ANY_TOKEN, self.sequence, Stopwatch())
        return 1000 * (time.perf_counter() - start)

    def decode(self) -> float:
        """Median milliseconds of a generated token after the latest prefill."""
        return statistics.median(self.step() for _ in range(DECODE_STEPS))

    def kept(self) -> list[int]:
        """Visual tokens behind every site in the latest prefill."""
        return [report.kept for report in self.chain.site_reports(self.sequence)]

    def cached_rows(self) -> float:
        """Rows in the caches at present, mean over layers."""
        caches = self.sequence.caches
        layers = sum(len(cache.layers) for cache in caches)
        return sum(cache.length * len(cache.layers) for cache in caches) / layers

    def flops(self) -> int:
        """Of the latest prefill."""
        manifest = self.chain.manifest
        kept = self.kept()
        rows = layer_rows(
            manifest.sites[: len(kept)],
            manifest.geometry.num_layers,
            self._entering,
            kept,
            self.prompt.text_tokens,
        )
        return decoder_prefill_flops(DecoderShape.from_geometry(manifest.geometry), rows)


@dataclass
class BundleBatch:
    """A bundle's decoder on several equal prompts, one after the other.

    Attributes:
        decoders: One for each request.
    """

    decoders: Collection[BundleDecoder]

    def prefill(self) -> float:
        """Run all prompts; milliseconds."""
        return sum(decoder.prefill() for decoder in self.decoders)

    def decode(self) -> float:
        """Milliseconds of one generated token for every request, after the latest prefill."""
        return sum(decoder.decode() for decoder in self.decoders)


class TransformersDecoder:
    """transformers' own decoder on the same hidden states, on the device and in the type of the model."""

    def __init__(self, model: LlavaForConditionalGeneration, prompt: RandomPrompt, requests: int = 1) -> None:
        """Run the tower; ``requests`` equal prompts are one batch."""
        self.model = model
        visual_tokens = prompt.num_pictures * prompt.size.visual_tokens
        with torch.no_grad():
            ids = torch.from_numpy(prompt.token_ids(visual_tokens))[None].to(model.device)
            embeds = model.get_input_embeddings()(ids)
            if prompt.num_pictures:
                pixels = torch.from_numpy(prompt.pixels()).to(model.device, model.dtype)
                features = model.get_image_features(pixel_values=pixels)
                features = getattr(features, "pooler_output", features)
                whole = isinstance(features, torch.Tensor)
                embeds[ids == prompt.image_token] = (
                    features.flatten(0, 1) if whole else torch.cat(list(features))
                )
        self._embeds = embeds.repeat(requests, 1, 1)
        self._cache = DynamicCache()

    def prefill(self) -> float:
        """Run the prompt; milliseconds."""
        self._cache = DynamicCache()
        return self._run(inputs_embeds=self._embeds)

    def decode(self) -> float:
        """Median milliseconds of one generated token for every request, after the latest prefill."""
        token = torch.full((len(self._embeds), 1), ANY_TOKEN, device=self.model.device)
        return statistics.median(self._run(input_ids=token) for _ in range(DECODE_STEPS))

    @torch.no_grad()
    def _run(self, **inputs: torch.Tensor) -> float:
        start = time.perf_counter()
        hidden = self.model.model.language_model(**inputs, past_key_values=self._cache, use_cache=True)
        # The copy to the host waits for a GPU, as a bundle's decoder does.
        self.model.lm_head(hidden.last_hidden_state[:, -1]).cpu()
        return 1000 * (time.perf_counter() - start)
