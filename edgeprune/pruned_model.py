"""The torch reference of a pruned model: the stages run one after the other, nothing fused, nothing exported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune import tensor_names as names
from edgeprune.errors import PromptError
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.numbering import ORIGINAL, next_position, segment_numberings
from edgeprune.positions import AXES, prompt_positions
from edgeprune.prune.ivtp_guide import IvtpGuide
from edgeprune.pruning_plan import PruningPlan
from edgeprune.runtimes.eviction import Eviction
from edgeprune.runtimes.guide import GuideInputs
from edgeprune.runtimes.layout import SequenceLayout
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.stages import (
    CompactStage,
    EmbedStage,
    GatherStage,
    GuideStage,
    ProjectorStage,
    RateStage,
    SegmentStage,
    SelectStage,
    Stage,
    VisionStage,
)
from edgeprune.visual_layout import FeatureRows

_Run = Callable[[Stage, dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class SiteResult:
    """What one site did in one prefill.

    Attributes:
        name: The site.
        tokens_in: Visual tokens that entered it.
        kept: Visual tokens that left it.
        slots: The kept tokens' slots (:mod:`edgeprune.visual_layout`), ascending.
    """

    name: str
    tokens_in: int
    kept: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class CacheEviction:
    """What a method that drops tokens while generating needs from the prefill.

    Attributes:
        state: Which rows the caches hold.
        visual_slots: [S] of the rows that entered the site.
        first_position: Position of the first generated token.
    """

    state: Eviction
    visual_slots: Tensor
    first_position: int


@dataclass
class Prefill:
    """The state after prefill.

    Attributes:
        logits: [V] of the last row.
        caches: Keys and values by layer, [1, Hkv, rows, D].
        sites: What every site did.
        next_position: Position of the first generated token, behind all of the unpruned prompt.
        eviction: Which rows the caches behind the last site hold, if tokens go on being dropped.
        record: Inputs and outputs of every stage that ran, in order (only if asked for).
    """

    logits: Tensor
    caches: dict[int, tuple[Tensor, Tensor]]
    sites: list[SiteResult]
    next_position: int
    eviction: "CacheEviction | None" = None
    record: list[tuple[Stage, dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=list)


@dataclass(frozen=True)
class TowerOutput:
    """Pictures behind the vision tower.

    Attributes:
        outputs: Of the vision stage, by name.
        rows: Which of them enter the decoder; the prompt needs as many placeholders.
        record: Inputs and outputs of the stage.
    """

    outputs: dict[str, Tensor]
    rows: FeatureRows
    record: list[tuple[Stage, dict[str, Tensor], dict[str, Tensor]]]


@dataclass(frozen=True)
class ClipParts:
    """What IVTP takes from a CLIP checkpoint.

    Attributes:
        guide: Text tower and projection with the selection of text rows.
        visual_projection: The picture's projection into the shared space.
    """

    guide: IvtpGuide
    visual_projection: nn.Linear


class PrunedModel:
    """A vision-language model with its pruning, in torch.

    Attributes:
        model: The unpruned model.
        plan: The pruning.
        weights: The learned tensors of the pruning methods.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        plan: PruningPlan,
        weights: Mapping[str, Tensor],
        clip: ClipParts | None = None,
        *,
        fused_rotary: bool = False,
    ) -> None:
        """Lay the pruning over the model.

        Args:
            model: The unpruned model.
            plan: The pruning.
            weights: The tensors of ``plan.weight_shapes()``.
            clip: Needed if the plan's probe is guided.
            fused_rotary: Whether the rotary embedding is traced as one ONNX operator.
        """
        self.model = model
        self.plan = plan
        self.weights = dict(weights)
        self.clip = clip
        width = model.config.decoder.hidden_size
        self.vision = VisionStage(model, plan, None if clip is None else clip.visual_projection)
        self.projector = ProjectorStage(model)
        self.embed = EmbedStage(model)
        self.guide = (
            None if clip is None else GuideStage(clip.guide, width, clip.visual_projection.out_features)
        )
        self.segments = [
            SegmentStage(model, plan, index, fused_rotary=fused_rotary)
            for index in range(len(plan.segment_cuts) - 1)
        ]
        self.selects = [
            SelectStage(planned, plan, weights, segment)
            for planned, segment in zip(plan.sites, self.segments, strict=False)
        ]
        self.numberings = segment_numberings([planned.site.positions for planned in plan.sites])
        self.axes = AXES[plan.geometry.positions]
        self.gather = None
        if plan.sites:
            self.gather = GatherStage(
                width, self.axes, probe=plan.probe is not None, deepstack_layers=plan.carried_deepstack_layers
            )
        rate = plan.rate(weights)
        self.rate = None if rate is None else RateStage(rate[1], self.segments[rate[0]])
        decoder = model.config.decoder
        self.compact = None if rate is None else CompactStage(decoder.num_kv_heads, decoder.head_dim)
        for stage in self.stages:
            stage.eval()

    @property
    def stages(self) -> list[Stage]:
        """Every stage, each once."""
        optional = [
            stage for stage in (self.guide, self.gather, self.rate, self.compact) if stage is not None
        ]
        return [self.vision, self.projector, self.embed, *self.segments, *self.selects, *optional]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.lm_head.weight.device

    @torch.no_grad()
    def encode_pictures(self, pictures: PreparedPictures) -> TowerOutput:
        """Run the vision tower: says how many visual tokens each picture brings into the prompt."""
        inputs = {
            spec.name: torch.from_numpy(pictures.inputs[spec.name]).to(
                self.device, self.dtype if spec.dtype == "model" else torch.int64
            )
            for spec in self.vision.inputs
        }
        outputs = self.vision(inputs)
        rows = pictures.layout.rows_beforehand(self.plan.tokens_per_tile, self.plan.geometry.num_patches)
        counts = outputs.get(names.PATCH_COUNTS)
        if rows is None or counts is not None:
            rows = pictures.layout.rows_of(
                outputs[names.PATCH_SLOTS].cpu().numpy(), None if counts is None else counts.cpu().numpy()
            )
        return TowerOutput(outputs, rows, [(self.vision, inputs, outputs)])

    @torch.no_grad()
    def visual_tokens(self, tower: TowerOutput) -> dict[str, Tensor]:
        """What the tower gave, projected, in the order of the prompt: what the stage ``embed`` takes, by name."""
        visual = self._visual_tokens(tower, lambda stage, inputs: stage(inputs))
        return {spec.name: visual[spec.name] for spec in self.embed.inputs if spec.name in visual}

    @torch.no_grad()
    def prefill(
        self,
        input_ids: NDArray[np.int64],
        pictures: PreparedPictures | None = None,
        guide: GuideInputs | None = None,
        *,
        tower: TowerOutput | None = None,
        record: bool = False,
    ) -> Prefill:
        """Run the prompt.

        Shapes:
            input_ids: [S], placeholders included.

        Args:
            input_ids: Token ids; every visual token that enters the decoder has one placeholder.
            pictures: Preprocessed pictures, None for a prompt without one.
            guide: The instruction for CLIP; needed with pictures if the plan's probe is guided.
            tower: What :meth:`encode_pictures` gave, if it ran already.
            record: Whether to keep every stage's inputs and outputs.

        Raises:
            PromptError: The placeholders do not fit the pictures, or the guide is missing.
        """
        result = Prefill(torch.empty(0), {}, [], 0)

        def run(stage: Stage, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            outputs: dict[str, Tensor] = stage(inputs)
            if record:
                result.record.append((stage, inputs, outputs))
            return outputs

        image_token = self.model.config.image_token_id
        visual_layout = None if pictures is None else pictures.layout
        layout = SequenceLayout.from_token_ids(input_ids, image_token, visual_layout)
        if pictures is not None and tower is None:
            tower = self.encode_pictures(pictures)
        self._check_prompt(layout, tower, guide)
        if tower is not None and record:
            result.record.extend(tower.record)
        positions = prompt_positions(self.plan.geometry.positions, input_ids == image_token, visual_layout)
        result.next_position = int(positions.max()) + 1
        visual = self._visual_tokens(tower, run)
        embedded = run(
            self.embed,
            {
                **{spec.name: visual[spec.name] for spec in self.embed.inputs if spec.name in visual},
                names.INPUT_IDS: torch.from_numpy(input_ids).unsqueeze(0),
            },
        )
        state = {
            **embedded,
            names.HIDDEN_STATES: embedded[names.INPUTS_EMBEDS],
            names.POSITION_IDS: torch.from_numpy(positions),
            names.PROMPT_SLOTS: embedded[names.VISUAL_SLOTS],
            **self._probe(layout, positions, visual, embedded[names.VISUAL_SLOTS], guide, run),
        }
        for index, segment in enumerate(self.segments):
            outputs = run(segment, self._segment_inputs(segment, state, {}))
            for layer in segment.layers:
                result.caches[layer] = (
                    outputs[names.present_key(layer)],
                    outputs[names.present_value(layer)],
                )
            if segment.is_last:
                result.logits = outputs[names.LOGITS][0]
                return result
            state[names.HIDDEN_STATES] = outputs[names.out(names.HIDDEN_STATES)]
            if pictures is not None:
                select = self.selects[index]
                entered = state[names.VISUAL_SLOTS]
                layout, chosen = self._drop(select, layout, outputs, state, result.sites, run)
                if names.VISUAL_RANKS in chosen and self.rate is not None:
                    rows = chosen[names.KEEP_INDICES][: layout.num_rows]
                    ranks = chosen[names.VISUAL_RANKS][rows].numpy()
                    eviction = Eviction(ranks, result.sites[-1].tokens_in, self.rate.num_rates)
                    result.eviction = CacheEviction(eviction, entered, result.next_position)
        raise AssertionError("the last segment returns")

    @torch.no_grad()
    def decode(
        self,
        token_id: int,
        position: int,
        caches: dict[int, tuple[Tensor, Tensor]],
        record: list[tuple[Stage, dict[str, Tensor], dict[str, Tensor]]] | None = None,
        eviction: CacheEviction | None = None,
    ) -> Tensor:
        """Run one generated token; extends ``caches`` (and may drop rows from them), returns the logits [V].

        Args:
            token_id: The token.
            position: Its position behind the unpruned prompt.
            caches: Keys and values by layer.
            record: Takes inputs and outputs of every stage that runs.
            eviction: From the prefill.
        """
        width = self.model.config.decoder.hidden_size

        def run(stage: Stage, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            outputs: dict[str, Tensor] = stage(inputs)
            if record is not None:
                record.append((stage, inputs, outputs))
            return outputs

        embedded = run(self.embed, {names.INPUT_IDS: torch.tensor([[token_id]]), **self._no_visual_tokens()})
        state = {
            **embedded,
            names.HIDDEN_STATES: embedded[names.INPUTS_EMBEDS],
            names.PROBE_WEIGHTS: torch.zeros(0, 1),
            names.PROBE_OFFSET: torch.zeros(0, width, dtype=self.dtype),
            names.PROBE_POSITION_IDS: torch.zeros(self.axes, 0, dtype=torch.int64),
        }
        for segment, numbering in zip(self.segments, self.numberings, strict=True):
            if segment.layers:
                cached = caches[segment.layers[0]][0].shape[2]
                number = next_position(numbering, position, cached)
                state[names.POSITION_IDS] = torch.full((self.axes, 1), number)
            outputs = run(segment, self._segment_inputs(segment, state, caches))
            for layer in segment.layers:
                caches[layer] = (outputs[names.present_key(layer)], outputs[names.present_value(layer)])
            if segment.is_last:
                return outputs[names.LOGITS][0]
            if eviction is not None and self.rate is not None and self.rate.layer in segment.layers:
                self._evict(outputs, caches, eviction, position, run)
            state[names.HIDDEN_STATES] = outputs[names.out(names.HIDDEN_STATES)]
        raise AssertionError("the last segment returns")

    def generate(
        self,
        input_ids: NDArray[np.int64],
        pictures: PreparedPictures | None = None,
        guide: GuideInputs | None = None,
        *,
        max_new_tokens: int = 64,
        eos_token_ids: Sequence[int] = (),
    ) -> tuple[list[int], list[SiteResult]]:
        """Answer greedily; returns the generated ids (without the end token) and what the sites did."""
        state = self.prefill(input_ids, pictures, guide)
        logits, generated = state.logits, list[int]()
        for step in range(max_new_tokens):
            token = int(logits.argmax())
            if token in eos_token_ids:
                break
            generated.append(token)
            if step + 1 < max_new_tokens:
                logits = self.decode(token, state.next_position + step, state.caches, eviction=state.eviction)
        return generated, state.sites

    def _check_prompt(
        self, layout: SequenceLayout, tower: TowerOutput | None, guide: GuideInputs | None
    ) -> None:
        expected = 0 if tower is None else sum(tower.rows.tokens_per_image)
        if layout.num_visual != expected:
            raise PromptError(
                f"the ids hold {layout.num_visual} visual placeholders, {layout.num_images} pictures need {expected}: "
                "expand each picture's placeholder to its visual tokens"
            )
        if self.guide is not None and layout.num_images and guide is None:
            raise PromptError(
                "this pruning chooses text tokens with CLIP: give the instruction as 'guide', too"
            )

    def _visual_tokens(self, tower: TowerOutput | None, run: _Run) -> dict[str, Tensor]:
        """What the tower gave, projected, in the order of the prompt."""
        if tower is not None:
            rows = {names.FEATURE_ROWS: torch.from_numpy(tower.rows.rows).to(self.device)}
            available = tower.outputs | rows
            inputs = {spec.name: available[spec.name] for spec in self.projector.inputs}
            return tower.outputs | run(self.projector, inputs)
        return self._no_visual_tokens()

    def _no_visual_tokens(self) -> dict[str, Tensor]:
        """One row that no placeholder asks for: text alone has no visual tokens."""
        width, added = self.model.config.decoder.hidden_size, self.model.config.geometry.deepstack_layers
        visual = {
            names.IMAGE_FEATURES: torch.zeros(1, width, dtype=self.dtype),
            names.IMAGE_SLOTS: torch.zeros(1, dtype=torch.int64),
        }
        if added:
            visual[names.IMAGE_DEEPSTACK_FEATURES] = torch.zeros(added, 1, width, dtype=self.dtype)
        return visual

    def _probe(
        self,
        layout: SequenceLayout,
        positions: NDArray[np.int64],
        visual: Mapping[str, Tensor],
        visual_slots: Tensor,
        guide: GuideInputs | None,
        run: _Run,
    ) -> dict[str, Tensor]:
        """The probe rows of a prompt; none for a prompt without pictures."""
        if self.plan.probe is None:
            return {}
        width = self.model.config.decoder.hidden_size
        text_rows = torch.from_numpy(layout.host_input(names.TEXT_ROWS))
        if not layout.num_images:
            return {
                names.PROBE_WEIGHTS: torch.zeros(0, layout.num_rows),
                names.PROBE_OFFSET: torch.zeros(0, width, dtype=self.dtype),
                names.PROBE_POSITION_IDS: torch.zeros(self.axes, 0, dtype=torch.int64),
            }
        first = int(text_rows[0])
        position = {names.PROBE_POSITION_IDS: torch.from_numpy(positions[:, first : first + 1])}
        if self.guide is not None and guide is not None:
            inputs = {
                names.GUIDE_INPUT_IDS: torch.from_numpy(guide.input_ids),
                names.GUIDE_TOKEN_MAP: torch.from_numpy(guide.token_map),
                names.IMAGE_EMBEDS: visual[names.IMAGE_EMBEDS],
                names.CLASS_FEATURES: visual[names.CLASS_FEATURES],
                names.TEXT_ROWS: text_rows,
                names.VISUAL_SLOTS: visual_slots,
            }
            return {**run(self.guide, inputs), **position}
        weights = torch.zeros(1, layout.num_rows)
        weights[0, text_rows] = 1 / layout.num_text_rows
        return {
            names.PROBE_WEIGHTS: weights,
            names.PROBE_OFFSET: torch.zeros(1, width, dtype=self.dtype),
            **position,
        }

    @staticmethod
    def _segment_inputs(
        segment: SegmentStage, state: Mapping[str, Tensor], caches: Mapping[int, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        config = segment.model.config.decoder
        empty = torch.zeros(
            1, config.num_kv_heads, 0, config.head_dim, dtype=state[names.HIDDEN_STATES].dtype
        )
        past: dict[str, Tensor] = {}
        for layer in segment.layers:
            past[names.past_key(layer)], past[names.past_value(layer)] = caches.get(layer, (empty, empty))
        return {
            spec.name: past[spec.name] if spec.name in past else state[spec.name] for spec in segment.inputs
        }

    def _drop(
        self,
        select: SelectStage,
        layout: SequenceLayout,
        outputs: Mapping[str, Tensor],
        state: dict[str, Tensor],
        sites: list[SiteResult],
        run: _Run,
    ) -> tuple[SequenceLayout, dict[str, Tensor]]:
        """Run one site and carry the kept rows on; returns the layout behind it and the site's outputs."""
        assert self.gather is not None
        site = select.planned.site
        available = {**state, **outputs}
        for name in site.host_inputs:
            available[name] = torch.from_numpy(layout.host_input(name, site))
        chosen = run(select, {spec.name: available[spec.name] for spec in select.inputs})
        keep_indices = chosen[names.KEEP_INDICES][: int(chosen[names.KEEP_COUNT])]
        for name in [name for name in state if names.extended(name) in chosen]:
            state[name] = chosen[names.extended(name)]
        gather_inputs = {names.KEEP_INDICES: keep_indices} | {
            spec.name: state[spec.name] for spec, _ in self.gather.carried
        }
        gathered = run(self.gather, gather_inputs)
        state.update({spec.name: gathered[names.out(spec.name)] for spec, _ in self.gather.carried})
        if site.positions != ORIGINAL:
            rows = torch.arange(keep_indices.shape[0])
            state[names.POSITION_IDS] = rows.expand(self.axes, -1).contiguous()
        kept = layout.keep(keep_indices.shape[0])
        slots = state[names.VISUAL_SLOTS]
        sites.append(
            SiteResult(
                select.name, layout.num_visual, kept.num_visual, tuple(sorted(slots[slots >= 0].tolist()))
            )
        )
        return kept, chosen

    def _evict(
        self,
        outputs: Mapping[str, Tensor],
        caches: dict[int, tuple[Tensor, Tensor]],
        eviction: CacheEviction,
        position: int,
        run: _Run,
    ) -> None:
        """Decide the rate of a generated token, and drop rows from the caches behind the site if it has grown."""
        assert self.rate is not None
        available = {**outputs, names.VISUAL_SLOTS: eviction.visual_slots}
        decided = run(self.rate, {spec.name: available[spec.name] for spec in self.rate.inputs})
        later = [layer for layer in caches if layer > self.rate.layer]
        cached_rows = caches[later[0]][0].shape[2]
        generated = position - eviction.first_position + 1
        rows = eviction.state.rows_to_keep(int(decided[names.RATE]), cached_rows, generated)
        if rows is None:
            return
        for layer in later:
            caches[layer] = self.compact_cache(*caches[layer], torch.from_numpy(rows), run)

    def compact_cache(self, key: Tensor, value: Tensor, rows: Tensor, run: _Run) -> tuple[Tensor, Tensor]:
        """The rows of one layer's cache that stay."""
        assert self.compact is not None
        inputs = {names.KEEP_INDICES: rows, names.CACHED_KEY: key, names.CACHED_VALUE: value}
        kept = run(self.compact, inputs)
        return kept[names.out(names.CACHED_KEY)], kept[names.out(names.CACHED_VALUE)]
