"""Prefill and decode over a bundle's graphs: the chain of segments with the sites between them."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import tensor_names as names
from edgeprune.manifest import Manifest, SiteEntry
from edgeprune.numbering import ORIGINAL, RENUMBERED, next_position, segment_numberings
from edgeprune.positions import AXES, prompt_positions
from edgeprune.runtimes.answer import SiteReport
from edgeprune.runtimes.backend import Backend, DeviceTensor, Graph
from edgeprune.runtimes.eviction import Eviction
from edgeprune.runtimes.guide import GuideInputs
from edgeprune.runtimes.host_pruner import Pruner, choose_rows
from edgeprune.runtimes.kv_cache import SegmentCache
from edgeprune.runtimes.layout import PROMPT_INPUTS, SequenceLayout
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.visual_layout import FeatureRows, VisualLayout

# What every segment is offered; a graph that does not read one of them leaves it.
_TRAVELLING = (names.HIDDEN_STATES, names.POSITION_IDS, names.DEEPSTACK_FEATURES)


class Stopwatch:
    """Milliseconds by name.

    Attributes:
        milliseconds: The sums.
        started: Of ``time.perf_counter``, when the answer began.
    """

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the time of the body to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = 1000 * (time.perf_counter() - start)
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + elapsed


@dataclass(frozen=True)
class _Drop:
    """What a site did; which tokens it kept stays on the device until somebody asks."""

    tokens_in: int
    kept: int
    visual_slots: DeviceTensor


@dataclass(frozen=True)
class _CacheEviction:
    """What dropping tokens while generating needs.

    Attributes:
        state: Which rows the caches hold.
        visual_slots: [S] of the rows that entered the site.
        first_position: Position of the first generated token.
    """

    state: Eviction
    visual_slots: DeviceTensor
    first_position: int


@dataclass
class Sequence:
    """A sequence between prefill and its last token.

    Attributes:
        caches: One per segment.
        position: Of the next token: behind the unpruned prompt and the tokens generated so far.
        drops: What the sites did, in order.
        eviction: What the caches behind the last site hold, if tokens go on being dropped.
    """

    caches: list[SegmentCache]
    position: int
    drops: list[_Drop] = field(default_factory=list)
    eviction: _CacheEviction | None = None


@dataclass(frozen=True)
class TowerOutput:
    """Pictures behind the vision tower.

    Attributes:
        layout: Their visual tokens, unpruned.
        outputs: Of the graph "vision", by name.
        rows: Which of them enter the decoder; the prompt needs as many placeholders.
    """

    layout: VisualLayout
    outputs: Mapping[str, DeviceTensor]
    rows: FeatureRows


class GraphChain:
    """The graphs of a bundle on one backend."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        graphs: Mapping[str, Graph],
        pruner: Pruner | None = None,
    ) -> None:
        """Take opened graphs.

        Args:
            manifest: Of the bundle.
            backend: That opened the graphs.
            graphs: All of the bundle's, by name.
            pruner: Chooses at the sites that let the host choose; None leaves it to them.
        """
        self.manifest = manifest
        self.backend = backend
        self.graphs = dict(graphs)
        self._pruner = pruner
        self.dtype = np.dtype(manifest.dtype)
        self._numberings = segment_numberings([site.positions for site in manifest.sites])
        self._axes = AXES[manifest.geometry.positions]
        read = {entry.name for site in manifest.sites for entry in manifest.graphs[site.graph].inputs}
        self._prompt_inputs = [name for name in PROMPT_INPUTS if name in read]
        width = manifest.geometry.hidden_size
        # Text alone has no visual tokens; the embedding graph reads one row that no placeholder asks for.
        self._no_visual = {
            names.IMAGE_FEATURES: backend.upload(np.zeros((1, width), self.dtype)),
            names.IMAGE_SLOTS: backend.upload(np.zeros(1, np.int64)),
        }
        if added := manifest.deepstack_layers:
            self._no_visual[names.IMAGE_DEEPSTACK_FEATURES] = backend.upload(
                np.zeros((added, 1, width), self.dtype)
            )
        self._no_probe = {
            names.PROBE_OFFSET: backend.upload(np.zeros((0, width), self.dtype)),
            names.PROBE_POSITION_IDS: backend.upload(np.zeros((self._axes, 0), np.int64)),
        }

    def encode_pictures(self, pictures: PreparedPictures, watch: Stopwatch) -> TowerOutput:
        """Run the vision tower: says how many visual tokens each picture brings into the prompt."""
        geometry = self.manifest.geometry
        inputs = {}
        for entry in self.manifest.graphs["vision"].inputs:
            array = pictures.inputs[entry.name]
            inputs[entry.name] = self.backend.upload(array.astype(np.dtype(entry.dtype), copy=False))
        with watch.time("vision"):
            outputs = self.graphs["vision"].run(inputs, {})
            rows = pictures.layout.rows_beforehand(geometry.tokens_per_tile, geometry.num_patches)
            counts = outputs.get(names.PATCH_COUNTS)
            if rows is None or counts is not None:
                # What is left depends on the pictures: the host has to look.
                with watch.time("wait.vision"):
                    slots = self.backend.download(outputs[names.PATCH_SLOTS])
                    tokens = None if counts is None else self.backend.download(counts)
                rows = pictures.layout.rows_of(slots, tokens)
        return TowerOutput(pictures.layout, outputs, rows)

    def entering_slots(self, tower: TowerOutput) -> tuple[int, ...]:
        """The slots of the visual tokens that enter the decoder, ascending."""
        slots = self.backend.download(tower.outputs[names.PATCH_SLOTS])
        rows = tower.rows.rows
        return tuple(sorted(int(slot) for slot in np.where(rows < 0, -1 - rows, slots[np.maximum(rows, 0)])))

    def prefill(
        self,
        token_ids: NDArray[np.int64],
        tower: TowerOutput | None,
        guide: GuideInputs | None,
        max_new_tokens: int,
        watch: Stopwatch,
    ) -> tuple[NDArray[Any], Sequence]:
        """Run a prompt; returns the logits [V] of its last row and the sequence.

        Shapes:
            token_ids: [S], placeholders included.
        """
        image_token = int(self.manifest.prompt["image_token_id"])
        visual_layout = None if tower is None else tower.layout
        layout = SequenceLayout.from_token_ids(token_ids, image_token, visual_layout)
        positions = prompt_positions(
            self.manifest.geometry.positions, token_ids == image_token, visual_layout
        )
        sequence = Sequence([], int(positions.max()) + 1)
        visual = self._visual_tokens(tower, watch)
        with watch.time("embed"):
            state = self._embed(token_ids, visual)
        state[names.POSITION_IDS] = self.backend.upload(positions)
        state[names.INPUTS_EMBEDS] = state[names.HIDDEN_STATES]
        state[names.PROMPT_SLOTS] = state[names.VISUAL_SLOTS]
        if tower is not None:
            for name in self._prompt_inputs:
                state[name] = self.backend.upload(layout.host_input(name))
        if self.manifest.probe is not None:
            with watch.time("guide"):
                state.update(self._probe(layout, positions, visual, state, guide))
        for index, segment in enumerate(self.manifest.segments):
            with watch.time(f"prefill.{segment.graph}"):
                cache = self._new_cache(index, layout.num_rows + max_new_tokens)
                outputs = self._run_segment(index, state, cache, layout.num_rows)
            sequence.caches.append(cache)
            if names.LOGITS in outputs:
                return self._logits(outputs, watch), sequence
            state[names.HIDDEN_STATES] = outputs[names.out(names.HIDDEN_STATES)]
            if tower is not None:
                layout = self._drop(index, layout, state, outputs, sequence, watch)
        raise AssertionError("the last segment gives logits")

    def decode(self, token_id: int, sequence: Sequence, watch: Stopwatch) -> NDArray[Any]:
        """Run one generated token; returns the logits [V]."""
        state = self._embed(np.array([token_id], np.int64), self._no_visual)
        state[names.POSITION_IDS] = self._position(sequence.position)
        if self.manifest.probe is not None:
            state.update(self._no_probe)
            state[names.PROBE_WEIGHTS] = self.backend.upload(np.zeros((0, 1), np.float32))
        for index, cache in enumerate(sequence.caches):
            if self._numberings[index] == RENUMBERED:
                position = next_position(RENUMBERED, sequence.position, cache.length)
                state[names.POSITION_IDS] = self._position(position)
            outputs = self._run_segment(index, state, cache, 1)
            if names.LOGITS in outputs:
                sequence.position += 1
                return self._logits(outputs, watch)
            if sequence.eviction is not None and index == len(self.manifest.sites) - 1:
                self._evict(outputs, sequence, sequence.eviction, watch)
            state[names.HIDDEN_STATES] = outputs[names.out(names.HIDDEN_STATES)]
        raise AssertionError("the last segment gives logits")

    def site_reports(self, sequence: Sequence) -> tuple[SiteReport, ...]:
        """What every site did with a sequence."""
        reports: list[SiteReport] = []
        for site, drop in zip(self.manifest.sites, sequence.drops, strict=False):
            slots = self.backend.download(drop.visual_slots)
            indices = tuple(sorted(int(slot) for slot in slots[slots >= 0]))
            reports.append(SiteReport(site.graph, site.place, drop.tokens_in, drop.kept, indices))
        if sequence.eviction is not None:
            reports[-1] = replace(reports[-1], evictions=tuple(sequence.eviction.state.events))
        return tuple(reports)

    def _position(self, position: int) -> DeviceTensor:
        """Position ids of one row that stands behind the prompt."""
        return self.backend.upload(np.full((self._axes, 1), position, np.int64))

    def _visual_tokens(self, tower: TowerOutput | None, watch: Stopwatch) -> Mapping[str, DeviceTensor]:
        """What the tower gave, projected, in the order of the prompt."""
        if tower is None:
            return self._no_visual
        with watch.time("projector"):
            available = {**tower.outputs, names.FEATURE_ROWS: self.backend.upload(tower.rows.rows)}
            inputs = {e.name: available[e.name] for e in self.manifest.graphs["projector"].inputs}
            return {**tower.outputs, **self.graphs["projector"].run(inputs, {})}

    def _embed(
        self, token_ids: NDArray[np.int64], visual: Mapping[str, DeviceTensor]
    ) -> dict[str, DeviceTensor]:
        inputs = {names.INPUT_IDS: self.backend.upload(token_ids[None])}
        for entry in self.manifest.graphs["embed"].inputs:
            if entry.name != names.INPUT_IDS:
                inputs[entry.name] = visual[entry.name]
        outputs = self.graphs["embed"].run(inputs, {})
        beside = {name: tensor for name, tensor in outputs.items() if name != names.INPUTS_EMBEDS}
        return {names.HIDDEN_STATES: outputs[names.INPUTS_EMBEDS], **beside}

    def _probe(
        self,
        layout: SequenceLayout,
        positions: NDArray[np.int64],
        visual: Mapping[str, DeviceTensor],
        state: Mapping[str, DeviceTensor],
        guide: GuideInputs | None,
    ) -> dict[str, DeviceTensor]:
        """The probe rows of a prompt; none for a prompt without pictures."""
        if not layout.num_images:
            weights = self.backend.upload(np.zeros((0, layout.num_rows), np.float32))
            return {**self._no_probe, names.PROBE_WEIGHTS: weights}
        text_rows = layout.host_input(names.TEXT_ROWS)
        first = int(text_rows[0])
        first_position = np.ascontiguousarray(positions[:, first : first + 1])
        position = {names.PROBE_POSITION_IDS: self.backend.upload(first_position)}
        if guide is None:
            uniform = np.zeros((1, layout.num_rows), np.float32)
            uniform[0, text_rows] = 1 / layout.num_text_rows
            offset = np.zeros((1, self.manifest.geometry.hidden_size), self.dtype)
            return {
                names.PROBE_WEIGHTS: self.backend.upload(uniform),
                names.PROBE_OFFSET: self.backend.upload(offset),
                **position,
            }
        inputs = {
            names.GUIDE_INPUT_IDS: self.backend.upload(guide.input_ids),
            names.GUIDE_TOKEN_MAP: self.backend.upload(guide.token_map),
            names.IMAGE_EMBEDS: visual[names.IMAGE_EMBEDS],
            names.CLASS_FEATURES: visual[names.CLASS_FEATURES],
            names.TEXT_ROWS: self.backend.upload(text_rows),
            names.VISUAL_SLOTS: state[names.VISUAL_SLOTS],
        }
        return {**self.graphs["guide"].run(inputs, {}), **position}

    def _new_cache(self, index: int, capacity: int) -> SegmentCache:
        geometry = self.manifest.geometry
        return SegmentCache(
            self.backend,
            self.manifest.segments[index].layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            capacity=capacity,
            dtype=self.dtype,
        )

    def _run_segment(
        self, index: int, state: Mapping[str, DeviceTensor], cache: SegmentCache, num_new: int
    ) -> dict[str, DeviceTensor]:
        segment = self.manifest.segments[index]
        inputs = {name: state[name] for name in _TRAVELLING if name in state} | cache.past()
        if segment.probe:
            for name in (names.PROBE_WEIGHTS, names.PROBE_OFFSET, names.PROBE_POSITION_IDS):
                inputs[name] = state[name]
        outputs = self.graphs[segment.graph].run(inputs, cache.present(num_new))
        cache.advance(num_new)
        return outputs

    def _drop(
        self,
        index: int,
        layout: SequenceLayout,
        state: dict[str, DeviceTensor],
        outputs: Mapping[str, DeviceTensor],
        sequence: Sequence,
        watch: Stopwatch,
    ) -> SequenceLayout:
        """Run the site behind a segment and carry the kept rows on."""
        site = self.manifest.sites[index]
        available = {**state, **outputs}
        inputs: dict[str, DeviceTensor] = {}
        with watch.time(f"select.{site.graph}"):
            for entry in self.manifest.graphs[site.graph].inputs:
                tensor = available.get(entry.name)
                if tensor is None:
                    tensor = self.backend.upload(layout.host_input(entry.name, site))
                inputs[entry.name] = tensor
            chosen = self.graphs[site.graph].run(inputs, {})
            left = layout.visual_tokens_behind(site)
            if left is None:
                # The count depends on the picture: the one number that crosses to the host.
                with watch.time(f"wait.{site.graph}"):
                    num_rows = int(self.backend.download(chosen[names.KEEP_COUNT]))
            else:
                num_rows = layout.num_rows - layout.num_visual + left
            rows = self._pruner_choice(site, layout, chosen, state[names.VISUAL_SLOTS], num_rows, watch)
            if rows is not None:
                chosen = {**chosen, names.KEEP_INDICES: self.backend.upload(rows)}
                num_rows = rows.shape[0]
        with watch.time(f"gather.{site.graph}"):
            if self.manifest.rate is not None and names.VISUAL_RANKS in chosen:
                rows = self.backend.download(chosen[names.KEEP_INDICES])[:num_rows]
                ranks = self.backend.download(chosen[names.VISUAL_RANKS])[rows]
                eviction = Eviction(ranks, layout.num_visual, self.manifest.rate.num_rates)
                sequence.eviction = _CacheEviction(eviction, state[names.VISUAL_SLOTS], sequence.position)
            # A site that merges tokens has appended rows to what travels on.
            state.update(
                {name: chosen[names.extended(name)] for name in state if names.extended(name) in chosen}
            )
            carried = [entry.name for entry in self.manifest.graphs["gather"].inputs]
            kept = chosen[names.KEEP_INDICES].view((num_rows,))
            gathered = self.graphs["gather"].run(
                {name: kept if name == names.KEEP_INDICES else state[name] for name in carried}, {}
            )
            state.update({name: gathered[names.out(name)] for name in carried if name != names.KEEP_INDICES})
        if site.positions != ORIGINAL:
            renumbered = np.tile(np.arange(num_rows, dtype=np.int64), (self._axes, 1))
            state[names.POSITION_IDS] = self.backend.upload(renumbered)
        after = layout.keep(num_rows)
        sequence.drops.append(_Drop(layout.num_visual, after.num_visual, state[names.VISUAL_SLOTS]))
        return after

    def _pruner_choice(
        self,
        site: SiteEntry,
        layout: SequenceLayout,
        chosen: Mapping[str, DeviceTensor],
        visual_slots: DeviceTensor,
        num_rows: int,
        watch: Stopwatch,
    ) -> NDArray[np.int64] | None:
        """The rows that the pruner keeps; None where the site's own choice of ``num_rows`` holds."""
        if (
            self._pruner is None
            or names.SCORES not in chosen
            or layout.visual is None
            or not layout.num_visual
        ):
            return None
        with watch.time(f"wait.{site.graph}"):
            scores = self.backend.download(chosen[names.SCORES])
            slots = self.backend.download(visual_slots)
            own_rows = self.backend.download(chosen[names.KEEP_INDICES])[:num_rows]
        with watch.time(f"pruner.{site.graph}"):
            return choose_rows(
                self._pruner,
                site,
                layout.visual,
                scores=scores,
                visual_slots=slots,
                own_rows=own_rows,
                elapsed_ms=1000 * (time.perf_counter() - watch.started),
            )

    def _evict(
        self,
        outputs: Mapping[str, DeviceTensor],
        sequence: Sequence,
        eviction: _CacheEviction,
        watch: Stopwatch,
    ) -> None:
        """Decide the rate of a generated token, and drop rows from the caches behind the site if it has grown."""
        available = {**outputs, names.VISUAL_SLOTS: eviction.visual_slots}
        inputs = {entry.name: available[entry.name] for entry in self.manifest.graphs["rate"].inputs}
        with watch.time("rate"):
            rate = int(self.backend.download(self.graphs["rate"].run(inputs, {})[names.RATE]))
        later = sequence.caches[len(self.manifest.sites) :]
        generated = sequence.position - eviction.first_position + 1
        rows = eviction.state.rows_to_keep(rate, later[0].length, generated)
        if rows is None:
            return
        with watch.time("evict"):
            kept = self.backend.upload(rows)
            for cache in later:
                cache.compact(self.graphs["compact"], kept)

    def _logits(self, outputs: Mapping[str, DeviceTensor], watch: Stopwatch) -> NDArray[Any]:
        with watch.time("logits_to_host"):
            logits: NDArray[Any] = self.backend.download(outputs[names.LOGITS])[0]
            return logits
