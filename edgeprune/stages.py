"""The stages of a pruned model: torch modules that take and return named tensors.

They are the reference that runs (:mod:`edgeprune.pruned_model`) and, one by one, the graphs that export traces:
``vision`` → ``projector`` → ``embed`` → [``guide``] → ``segment0`` → ``site0`` → ``gather`` → ``segment1`` … → logits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgeprune import tensor_names as names
from edgeprune.errors import PruningError
from edgeprune.models.deepstack import features_by_row
from edgeprune.models.llama import Probe, blocks_between, causal_mask, rotary_angles, run_blocks
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.operators.token_gather import token_gather
from edgeprune.positions import AXES
from edgeprune.prune.ivtp_guide import IvtpGuide
from edgeprune.prune.method import MergingSelector, RankingSelector, RateSpec, ScoringSelector
from edgeprune.pruning_plan import PlannedSite, PruningPlan
from edgeprune.tensor_spec import TensorSpec


class Stage(nn.Module):
    """A part of the model between named tensors.

    Attributes:
        name: Name of the stage and of its graph.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs from the inputs."""
        raise NotImplementedError


class VisionStage(Stage):
    """Pictures → features, the tokens that pruning leaves of them."""

    def __init__(
        self, model: VisionLanguageModel, plan: PruningPlan, visual_projection: nn.Linear | None
    ) -> None:
        super().__init__()
        self.name = "vision"
        self.model = model
        self.pruner = plan.vision_pruner()
        self.feature_pruner = plan.feature_pruner(model.clip_tower)
        self.visual_projection = visual_projection
        self.tile_size = plan.geometry.num_patches
        self.inputs = model.vision_inputs
        counted = self.feature_pruner is not None and self.feature_pruner.counted
        outputs = [
            TensorSpec(names.PATCH_FEATURES, "model", ("patch_rows", model.config.feature_size)),
            TensorSpec(names.PATCH_SLOTS, "int64", ("patch_rows",)),
            *([TensorSpec(names.PATCH_COUNTS, "int64", ("tiles",))] if counted else []),
        ]
        if visual_projection is not None:
            width = model.config.decoder.hidden_size
            outputs.append(TensorSpec(names.CLASS_FEATURES, "model", ("tiles", width)))
            outputs.append(TensorSpec(names.IMAGE_EMBEDS, "model", ("tiles", visual_projection.out_features)))
        self.outputs = tuple(outputs)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode the pictures."""
        tower = self.model.encode(
            inputs,
            pruner=self.pruner,
            feature_pruner=self.feature_pruner,
            pooled=self.visual_projection is not None,
        )
        tile = torch.arange(tower.slots.shape[0], device=tower.slots.device).unsqueeze(1)
        outputs = {
            names.PATCH_FEATURES: tower.features.flatten(0, 1),
            names.PATCH_SLOTS: (tower.slots + tile * self.tile_size).flatten(),
        }
        if tower.counts is not None:
            outputs[names.PATCH_COUNTS] = tower.counts
        if self.visual_projection is not None:
            assert tower.class_hidden is not None
            assert tower.pooled is not None
            outputs[names.CLASS_FEATURES] = self.model.project(tower.class_hidden)
            outputs[names.IMAGE_EMBEDS] = self.visual_projection(tower.pooled)
        return outputs


class ProjectorStage(Stage):
    """Features → visual tokens of the decoder, in the order of the prompt."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.name = "projector"
        self.model = model
        config = model.config
        self.deepstack_layers = config.geometry.deepstack_layers
        self.inputs = (
            TensorSpec(names.PATCH_FEATURES, "model", ("patch_rows", config.feature_size)),
            TensorSpec(names.PATCH_SLOTS, "int64", ("patch_rows",)),
            TensorSpec(names.FEATURE_ROWS, "int64", ("visual_tokens",)),
        )
        self.outputs = (
            TensorSpec(names.IMAGE_FEATURES, "model", ("visual_tokens", config.decoder.hidden_size)),
            TensorSpec(names.IMAGE_SLOTS, "int64", ("visual_tokens",)),
            *_deepstack_specs(model, names.IMAGE_DEEPSTACK_FEATURES, "visual_tokens"),
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather and project."""
        rows = inputs[names.FEATURE_ROWS]
        own = rows.clamp(min=0)
        features = inputs[names.PATCH_FEATURES].index_select(0, own)
        projected = self.model.project(features)
        slots = inputs[names.PATCH_SLOTS].index_select(0, own)
        newline = self.model.newline
        if newline is not None:
            projected = torch.where(rows.unsqueeze(1) < 0, newline.to(projected.dtype), projected)
            slots = torch.where(rows < 0, -1 - rows, slots)
        outputs = {names.IMAGE_FEATURES: projected, names.IMAGE_SLOTS: slots}
        if self.deepstack_layers:
            outputs[names.IMAGE_DEEPSTACK_FEATURES] = self.model.deepstack(features)
        return outputs


class EmbedStage(Stage):
    """Token ids and visual tokens → hidden states."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.name = "embed"
        self.model = model
        width = model.config.decoder.hidden_size
        self.inputs = (
            TensorSpec(names.INPUT_IDS, "int64", (1, "sequence")),
            TensorSpec(names.IMAGE_FEATURES, "model", ("visual_tokens", width)),
            TensorSpec(names.IMAGE_SLOTS, "int64", ("visual_tokens",)),
            *_deepstack_specs(model, names.IMAGE_DEEPSTACK_FEATURES, "visual_tokens"),
        )
        self.outputs = (
            TensorSpec(names.INPUTS_EMBEDS, "model", (1, "sequence", width)),
            TensorSpec(names.VISUAL_SLOTS, "int64", ("sequence",)),
            *_deepstack_specs(model, names.DEEPSTACK_FEATURES, "sequence"),
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embed one sequence."""
        hidden, slots = self.model.embed(
            inputs[names.INPUT_IDS], inputs[names.IMAGE_FEATURES], inputs[names.IMAGE_SLOTS]
        )
        outputs = {names.INPUTS_EMBEDS: hidden, names.VISUAL_SLOTS: slots}
        if names.IMAGE_DEEPSTACK_FEATURES in inputs:
            outputs[names.DEEPSTACK_FEATURES] = features_by_row(inputs[names.IMAGE_DEEPSTACK_FEATURES], slots)
        return outputs


class GuideStage(Stage):
    """Instruction and pictures → the rows that the probe averages."""

    def __init__(self, guide: IvtpGuide, hidden_size: int, embed_size: int) -> None:
        super().__init__()
        self.name = "guide"
        self.guide = guide
        length = guide.text_tower.config.context_length
        self.inputs = (
            TensorSpec(names.GUIDE_INPUT_IDS, "int64", ("chunks", length)),
            TensorSpec(names.GUIDE_TOKEN_MAP, "float32", ("text_rows", "guide_tokens")),
            TensorSpec(names.IMAGE_EMBEDS, "model", ("tiles", embed_size)),
            TensorSpec(names.CLASS_FEATURES, "model", ("tiles", hidden_size)),
            TensorSpec(names.TEXT_ROWS, "int64", ("text_rows",)),
            TensorSpec(names.VISUAL_SLOTS, "int64", ("sequence",)),
        )
        self.outputs = (
            TensorSpec(names.PROBE_WEIGHTS, "float32", (1, "sequence")),
            TensorSpec(names.PROBE_OFFSET, "model", (1, hidden_size)),
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the rows."""
        outputs: dict[str, Tensor] = self.guide(inputs)
        return outputs


class SegmentStage(Stage):
    """Consecutive decoder blocks with their KV cache; the last one ends in the logits of the last row."""

    def __init__(
        self, model: VisionLanguageModel, plan: PruningPlan, index: int, *, fused_rotary: bool = False
    ) -> None:
        super().__init__()
        self.name = f"segment{index}"
        self.model = model
        self.fused_rotary = fused_rotary
        self.axes = AXES[plan.geometry.positions]
        cuts = plan.segment_cuts
        self.start, self.end = cuts[index], cuts[index + 1]
        self.layers = tuple(
            layer for layer, block in blocks_between(self.start, self.end) if block == "attention"
        )
        # What it adds behind its MLPs (DeepStack).
        self.adds = any(
            block == "mlp" and layer < plan.geometry.deepstack_layers
            for layer, block in blocks_between(self.start, self.end)
        )
        self.is_last = index == len(cuts) - 2
        reads = {name for planned in plan.sites for name in planned.site.reads}
        self.query_layers = tuple(layer for layer in self.layers if names.query(layer) in reads)
        probe = plan.probe
        self.probe_layers = tuple(
            layer for layer in self.layers if probe is not None and layer in probe.layers
        )
        self.inputs = self._input_specs()
        self.outputs = self._output_specs()

    def _input_specs(self) -> tuple[TensorSpec, ...]:
        config = self.model.config.decoder
        specs = [TensorSpec(names.HIDDEN_STATES, "model", (1, "sequence", config.hidden_size))]
        if self.adds:
            specs.extend(_deepstack_specs(self.model, names.DEEPSTACK_FEATURES, "sequence"))
        if not self.layers:
            # Nothing (a site before layer 0), or only an MLP and the head (a site inside the last layer).
            return tuple(specs)
        specs.append(TensorSpec(names.POSITION_IDS, "int64", (self.axes, "sequence")))
        cache = (1, config.num_kv_heads, "past", config.head_dim)
        for layer in self.layers:
            specs.append(TensorSpec(names.past_key(layer), "model", cache))
            specs.append(TensorSpec(names.past_value(layer), "model", cache))
        if self.probe_layers:
            specs.append(TensorSpec(names.PROBE_WEIGHTS, "float32", ("probe_rows", "sequence")))
            specs.append(TensorSpec(names.PROBE_OFFSET, "model", ("probe_rows", config.hidden_size)))
            specs.append(TensorSpec(names.PROBE_POSITION_IDS, "int64", (self.axes, "probe_rows")))
        return tuple(specs)

    def _output_specs(self) -> tuple[TensorSpec, ...]:
        config = self.model.config.decoder
        first = (
            TensorSpec(names.LOGITS, "model", (1, config.vocab_size))
            if self.is_last
            else TensorSpec(names.out(names.HIDDEN_STATES), "model", (1, "sequence", config.hidden_size))
        )
        specs = [first]
        cache = (1, config.num_kv_heads, "past + sequence", config.head_dim)
        for layer in self.layers:
            specs.append(TensorSpec(names.present_key(layer), "model", cache))
            specs.append(TensorSpec(names.present_value(layer), "model", cache))
        query = (1, config.num_heads, "sequence", config.head_dim)
        specs.extend(TensorSpec(names.query(layer), "model", query) for layer in self.query_layers)
        for layer in self.probe_layers:
            probe = (1, config.num_heads, "probe_rows", config.head_dim)
            specs.append(TensorSpec(names.probe_query(layer), "model", probe))
            probe = (1, config.num_kv_heads, "probe_rows", config.head_dim)
            specs.append(TensorSpec(names.probe_key(layer), "model", probe))
        return tuple(specs)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the segment over S new rows."""
        config = self.model.config.decoder
        hidden = inputs[names.HIDDEN_STATES]
        past = {
            layer: (inputs[names.past_key(layer)], inputs[names.past_value(layer)]) for layer in self.layers
        }
        angles = mask = probe = None
        if self.layers:
            angles = rotary_angles(config, inputs[names.POSITION_IDS], hidden.dtype, fused=self.fused_rotary)
            mask = causal_mask(hidden.shape[1], past[self.layers[0]][0].shape[2], hidden.device)
        if self.probe_layers:
            probe = Probe(
                inputs[names.PROBE_WEIGHTS],
                inputs[names.PROBE_OFFSET],
                rotary_angles(
                    config, inputs[names.PROBE_POSITION_IDS], hidden.dtype, fused=self.fused_rotary
                ),
            )
        ran = run_blocks(
            self.model.language_model,
            self.start,
            self.end,
            hidden,
            angles,
            mask,
            past,
            probe,
            self.probe_layers,
            inputs[names.DEEPSTACK_FEATURES] if self.adds else None,
        )
        outputs: dict[str, Tensor] = {}
        if self.is_last:
            outputs[names.LOGITS] = self.model.head(ran.hidden[:, -1])
        else:
            # A graph's output is another value than its input, also where no block lies between (before layer 0).
            outputs[names.out(names.HIDDEN_STATES)] = ran.hidden if self.start < self.end else hidden.clone()
        for layer, attention in ran.attentions.items():
            outputs[names.present_key(layer)] = attention.key
            outputs[names.present_value(layer)] = attention.value
            if layer in self.query_layers:
                outputs[names.query(layer)] = attention.query
            if attention.probe_query is not None and attention.probe_key is not None:
                outputs[names.probe_query(layer)] = attention.probe_query
                outputs[names.probe_key(layer)] = attention.probe_key
        return {spec.name: outputs[spec.name] for spec in self.outputs}


class SelectStage(Stage):
    """Scores and selects at one site; runs in prefill only."""

    HOST_INPUTS: Mapping[str, TensorSpec] = {
        names.TEXT_ROWS: TensorSpec(names.TEXT_ROWS, "int64", ("text_rows",)),
        names.CONTEXT_ROWS: TensorSpec(names.CONTEXT_ROWS, "int64", ("context_rows",)),
        names.GRID_IDS: TensorSpec(names.GRID_IDS, "int64", ("grids",)),
        names.GRID_KEEP: TensorSpec(names.GRID_KEEP, "int64", ("grids",)),
        names.VISUAL_PLACES: TensorSpec(names.VISUAL_PLACES, "int64", ("slots", 5)),
        names.NUM_KEEP: TensorSpec(names.NUM_KEEP, "int64", ()),
        names.PROMPT_TEXT_ROWS: TensorSpec(names.PROMPT_TEXT_ROWS, "int64", ("text_rows",)),
        names.RECYCLED_IDS: TensorSpec(names.RECYCLED_IDS, "int64", ("recycled",)),
        names.MERGED_IDS: TensorSpec(names.MERGED_IDS, "int64", ("merged",)),
    }

    def __init__(
        self,
        planned: PlannedSite,
        plan: PruningPlan,
        weights: Mapping[str, Tensor],
        segment: SegmentStage,
    ) -> None:
        """Build the site's module.

        Raises:
            PruningError: The site reads a layer that ran before an earlier site: its rows are not these any more.
        """
        super().__init__()
        self.name = planned.name
        self.planned = planned
        self.selector = planned.selector(plan.geometry, weights, segment.model.language_model)
        produced = {spec.name: spec for spec in segment.outputs}
        width = segment.model.config.decoder.hidden_size
        travelling = (
            TensorSpec(names.POSITION_IDS, "int64", (segment.axes, "sequence")),
            TensorSpec(names.INPUTS_EMBEDS, "model", (1, "prompt", width)),
            TensorSpec(names.PROMPT_SLOTS, "int64", ("prompt",)),
        )
        produced |= {spec.name: spec for spec in travelling}
        missing = [name for name in planned.site.reads if name not in produced]
        if missing:
            raise PruningError(
                f"{planned.method.name}: the site {planned.site.cut.description} reads '{missing[0]}', which is not "
                f"between it and the site before it ({segment.start.description}): move one of the two"
            )
        self.inputs = (
            *(_as_input(produced[name]) for name in planned.site.reads),
            TensorSpec(names.VISUAL_SLOTS, "int64", ("sequence",)),
            *(self.HOST_INPUTS[name] for name in planned.site.host_inputs),
        )
        merges = isinstance(self.selector, MergingSelector)
        rows = "sequence + merged" if merges else "sequence"
        outputs = [
            TensorSpec(names.KEEP_INDICES, "int64", (rows,)),
            TensorSpec(names.KEEP_COUNT, "int64", ()),
        ]
        if merges:
            outputs += [
                TensorSpec(names.extended(names.HIDDEN_STATES), "model", (1, rows, width)),
                TensorSpec(names.extended(names.POSITION_IDS), "int64", (segment.axes, rows)),
                TensorSpec(names.extended(names.VISUAL_SLOTS), "int64", (rows,)),
            ]
        if isinstance(self.selector, RankingSelector):
            outputs.append(TensorSpec(names.VISUAL_RANKS, "int64", ("sequence",)))
        if isinstance(self.selector, ScoringSelector):
            if len(outputs) > 2:
                raise PruningError(
                    f"{planned.method.name}: a selector that gives its scores neither merges nor ranks: derive it "
                    "from ScoringSelector alone"
                )
            outputs.append(TensorSpec(names.SCORES, "float32", ("sequence",)))
        self.outputs = tuple(outputs)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the rows that survive."""
        keep_indices, keep_count, *more = self.selector(inputs)
        outputs = {names.KEEP_INDICES: keep_indices, names.KEEP_COUNT: keep_count}
        for named in more:
            outputs |= named
        return {spec.name: outputs[spec.name] for spec in self.outputs}


class GatherStage(Stage):
    """The kept rows of everything that travels to the next segment; runs in prefill only."""

    def __init__(self, hidden_size: int, axes: int, *, probe: bool, deepstack_layers: int = 0) -> None:
        """Say what travels.

        Args:
            hidden_size: C.
            axes: Position ids of a row.
            probe: Whether the probe's weights do.
            deepstack_layers: Additions that do, J; 0 where no site lies before the last of them.
        """
        super().__init__()
        self.name = "gather"
        deepstack = TensorSpec(names.DEEPSTACK_FEATURES, "model", (deepstack_layers, "sequence", hidden_size))
        self.carried = (
            (TensorSpec(names.HIDDEN_STATES, "model", (1, "sequence", hidden_size)), 1),
            (TensorSpec(names.POSITION_IDS, "int64", (axes, "sequence")), 1),
            (TensorSpec(names.VISUAL_SLOTS, "int64", ("sequence",)), 0),
            *([(TensorSpec(names.PROBE_WEIGHTS, "float32", ("probe_rows", "sequence")), 1)] if probe else []),
            *([(deepstack, 1)] if deepstack_layers else []),
        )
        self.inputs = (
            TensorSpec(names.KEEP_INDICES, "int64", ("kept",)),
            *(spec for spec, _ in self.carried),
        )
        self.outputs = tuple(
            TensorSpec(
                names.out(spec.name),
                spec.dtype,
                tuple("kept" if dim == "sequence" else dim for dim in spec.shape),
            )
            for spec, _ in self.carried
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather the rows."""
        gathered = token_gather(
            inputs[names.KEEP_INDICES],
            [inputs[spec.name] for spec, _ in self.carried],
            [axis for _, axis in self.carried],
        )
        return {spec.name: tensor for spec, tensor in zip(self.outputs, gathered, strict=True)}


class RateStage(Stage):
    """What share of the visual tokens is removed, at one generated token; runs in decoding only."""

    def __init__(self, spec: RateSpec, segment: SegmentStage) -> None:
        super().__init__()
        self.name = "rate"
        self.layer, self.num_rates = spec.layer, spec.num_rates
        self.decision = spec.decision
        config = segment.model.config.decoder
        self.inputs = (
            TensorSpec(names.query(self.layer), "model", (1, config.num_heads, 1, config.head_dim)),
            TensorSpec(
                names.present_key(self.layer),
                "model",
                (1, config.num_kv_heads, "past + sequence", config.head_dim),
            ),
            TensorSpec(names.VISUAL_SLOTS, "int64", ("prompt",)),
        )
        self.outputs = (TensorSpec(names.RATE, "int64", ()),)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decide."""
        return {names.RATE: self.decision(*(inputs[spec.name] for spec in self.inputs))}


class CompactStage(Stage):
    """The rows of one layer's KV cache that stay."""

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.name = "compact"
        cached = (names.CACHED_KEY, names.CACHED_VALUE)
        self.inputs = (
            TensorSpec(names.KEEP_INDICES, "int64", ("kept",)),
            *(TensorSpec(name, "model", (1, num_kv_heads, "past", head_dim)) for name in cached),
        )
        self.outputs = tuple(
            TensorSpec(names.out(name), "model", (1, num_kv_heads, "kept", head_dim)) for name in cached
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather them."""
        cached = [inputs[names.CACHED_KEY], inputs[names.CACHED_VALUE]]
        key, value = token_gather(inputs[names.KEEP_INDICES], cached, [2, 2])
        return {names.out(names.CACHED_KEY): key, names.out(names.CACHED_VALUE): value}


def _deepstack_specs(model: VisionLanguageModel, name: str, rows: str) -> tuple[TensorSpec, ...]:
    """The tensor of DeepStack's additions, by visual token or by row; none in a family without them."""
    added, width = model.config.geometry.deepstack_layers, model.config.decoder.hidden_size
    return (TensorSpec(name, "model", (added, rows, width)),) if added else ()


def _as_input(spec: TensorSpec) -> TensorSpec:
    """A segment's output as a site's input: in prefill the cache is empty and there is one probe row."""
    sizes: dict[int | str, int | str] = {"past + sequence": "sequence", "probe_rows": 1}
    return TensorSpec(spec.name, spec.dtype, tuple(sizes.get(dim, dim) for dim in spec.shape))
