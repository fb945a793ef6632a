"""Training data: questions about pictures with their answers, as batches of embedded sequences."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune import tensor_names as names
from edgeprune.calib.samples import BadSample, Sample, no_samples
from edgeprune.errors import DataError, PictureError, PromptError
from edgeprune.export.input_settings import InputSettings
from edgeprune.positions import prompt_positions
from edgeprune.pruned_model import PrunedModel
from edgeprune.runtimes.preprocessing import read_picture
from edgeprune.runtimes.prompt import PromptEncoder
from edgeprune.visual_layout import VisualLayout

IGNORED = -100
_CACHE_BYTES = 2 * 2**30
_NO_ANSWER = 'no answer to learn from: give the right one as "answer"'


@dataclass(frozen=True)
class Example:
    """A question with its answer, as ids.

    Attributes:
        pictures: Where its pictures lie.
        prompt: [P] int64, visual placeholders expanded.
        answer: [T] int64, ends with the token that ends an answer.
        layout: The visual tokens of the pictures.
    """

    pictures: tuple[Path, ...]
    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    layout: VisualLayout

    @property
    def num_visual(self) -> int:
        """How many of the prompt's tokens are visual."""
        return len(self.layout.slots)


@dataclass(frozen=True)
class TrainingBatch:
    """Sequences padded on the right.

    Shapes:
        inputs_embeds: [B, S, C], prompts with their answers but for the last token.
        position_ids: [B, A, S] int64.
        visual_slots: [B, S] int64, -1 where a row is no visual token.
        deepstack: [B, S, J, C], what DeepStack adds behind the first J layers; None where J is 0.
        prompt_length, length: [B] int64, rows of the prompt, and with the answer.
        targets: [B, S] int64, the token to predict at each row, or -100.

    Attributes:
        tables: Of each sequence, where a slot stands, [P, 5] int64 (``VisualLayout.table``).
        num_grids: Of each sequence, G.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    visual_slots: Tensor
    deepstack: Tensor | None
    prompt_length: Tensor
    length: Tensor
    targets: Tensor
    tables: tuple[Tensor, ...]
    num_grids: tuple[int, ...]

    @property
    def size(self) -> int:
        """B."""
        return self.targets.shape[0]

    @property
    def num_targets(self) -> Tensor:
        """[] float32, how many tokens are to be predicted."""
        return (self.targets != IGNORED).sum().float()

    def right(self, logits: Tensor) -> Tensor:
        """[B] bool: whether greedy generation would give the whole answer; logits [B, S, V]."""
        return ((logits.argmax(dim=-1) == self.targets) | (self.targets == IGNORED)).all(dim=-1)


class TrainingData:
    """Examples of a checkpoint's own preprocessing and prompt format, embedded when they are asked for.

    What the vision tower and the projector give is frozen; it is computed once per picture and kept in memory, the
    least recently used ones forgotten above a limit.
    """

    def __init__(
        self, unpruned: PrunedModel, settings: InputSettings, *, cache_bytes: int = _CACHE_BYTES
    ) -> None:
        """Hold nothing yet.

        Args:
            unpruned: The model without pruning.
            settings: Of the same checkpoint.
            cache_bytes: Most memory of kept features.
        """
        self.examples: list[Example] = []
        self._model = unpruned
        self._settings = settings
        self._encoder: PromptEncoder = settings.prompt_encoder()
        self._cache_bytes = cache_bytes
        self._cached = 0
        self._features: OrderedDict[tuple[Path, ...], dict[str, Tensor]] = OrderedDict()
        self._layouts: dict[tuple[Path, ...], VisualLayout] = {}
        self._shapes: dict[bytes, VisualLayout] = {}

    def add(self, samples: Iterable[Sample], bad: Callable[[BadSample], None]) -> None:
        """Open the samples' pictures once and encode their questions; those that cannot be used go to ``bad``.

        Raises:
            DataError: None can be used.
        """
        found: list[BadSample] = []
        for sample in samples:
            try:
                self.examples.append(self._example(sample))
            except (DataError, PictureError, PromptError) as error:
                found.append(BadSample(sample.number, sample.name, str(error)))
                bad(found[-1])
        if not self.examples:
            raise DataError(no_samples(found))

    @property
    def mean_visual(self) -> float:
        """Visual tokens of an example before pruning, on average."""
        return float(np.mean([example.num_visual for example in self.examples]))

    def batch(self, chosen: Sequence[int]) -> TrainingBatch:
        """Embed some of the examples; the gradient goes on into the embedding matrix if that is trained."""
        examples = [self.examples[index] for index in chosen]
        device, kind = self._model.device, self._model.plan.geometry.positions
        sequences, slots, positions, tables, deepstack = [], [], [], [], []
        for example in examples:
            ids = torch.from_numpy(np.concatenate((example.prompt, example.answer[:-1]))).to(device)
            visual = self._visual_tokens(example.pictures)
            embedded = self._model.embed({names.INPUT_IDS: ids.unsqueeze(0), **visual})
            by_row = embedded[names.VISUAL_SLOTS]
            sequences.append(embedded[names.INPUTS_EMBEDS][0])
            slots.append(by_row)
            if names.DEEPSTACK_FEATURES in embedded:
                deepstack.append(embedded[names.DEEPSTACK_FEATURES].transpose(0, 1))
            is_visual = (by_row >= 0).cpu().numpy()
            positions.append(torch.from_numpy(prompt_positions(kind, is_visual, example.layout).T).to(device))
            tables.append(torch.from_numpy(example.layout.table).to(device))
        targets = torch.full((len(examples), max(map(len, slots))), IGNORED)
        for row, example in enumerate(examples):
            first = len(example.prompt) - 1
            targets[row, first : first + len(example.answer)] = torch.from_numpy(example.answer)
        pad = torch.nn.utils.rnn.pad_sequence
        return TrainingBatch(
            inputs_embeds=pad(sequences, batch_first=True),
            position_ids=pad(positions, batch_first=True).transpose(1, 2),
            visual_slots=pad(slots, batch_first=True, padding_value=-1),
            deepstack=pad(deepstack, batch_first=True) if deepstack else None,
            prompt_length=torch.tensor([len(example.prompt) for example in examples], device=device),
            length=torch.tensor([len(sequence) for sequence in sequences], device=device),
            targets=targets.to(device),
            tables=tuple(tables),
            num_grids=tuple(len(example.layout.grids) for example in examples),
        )

    def _example(self, sample: Sample) -> Example:
        if sample.answer is None or not sample.answer.strip():
            raise DataError(_NO_ANSWER)
        if sample.pictures not in self._layouts:
            images = [read_picture(path) for path in sample.pictures]
            prepared = self._settings.preprocessing.prepare(images, self._model.plan.geometry.grid)
            # Pictures of one shape share a layout; training does not ask what part of a picture a grid shows.
            places, slots = prepared.layout.places, prepared.layout.slots
            shape = hashlib.sha256(places.tobytes() + b"|" + slots.tobytes()).digest()
            self._layouts[sample.pictures] = self._shapes.setdefault(shape, prepared.layout)
        layout = self._layouts[sample.pictures]
        counts = layout.tokens_per_image
        prompt = self._encoder.encode_chat(sample.prompt, counts).token_ids
        answer = sample.answer.strip()
        whole = self._encoder.encode_chat(sample.prompt, counts, max_new_tokens=1, answer=answer).token_ids
        if not np.array_equal(whole[: len(prompt)], prompt):
            # The tokenizer joins the end of the prompt with the answer, and no generated answer begins like that.
            tokens = self._encoder.tokenizer.encode(f" {answer}", add_special_tokens=False).ids
            whole = np.concatenate((prompt, np.array(tokens, np.int64)))
        end = self._settings.prompt_format.eos_token_ids[0]
        return Example(sample.pictures, prompt, np.append(whole[len(prompt) :], end), layout)

    def _visual_tokens(self, pictures: tuple[Path, ...]) -> dict[str, Tensor]:
        if pictures in self._features:
            self._features.move_to_end(pictures)
            return {name: kept.to(self._model.device) for name, kept in self._features[pictures].items()}
        images = [read_picture(path) for path in pictures]
        prepared = self._settings.preprocessing.prepare(images, self._model.plan.geometry.grid)
        visual = self._model.visual_tokens(self._model.encode_pictures(prepared))
        self._features[pictures] = {name: tensor.cpu() for name, tensor in visual.items()}
        self._cached += _size(visual)
        while self._cached > self._cache_bytes:
            self._cached -= _size(self._features.popitem(last=False)[1])
        return visual


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
