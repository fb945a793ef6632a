"""Asking bundles of the example the same questions, and methods scaled to one average number of tokens."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import edgeprune
from edgeprune.cost import (
    DecoderShape,
    VisionShape,
    average_visual_tokens,
    decoder_prefill_flops,
    layer_rows,
    projector_flops,
    vision_flops,
)
from edgeprune.export.exporter import export
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.method import ModelGeometry, PruningMethod

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shapes"


@dataclass
class Tally:
    """What one bundle did.

    Attributes:
        name: Row of the table.
        session: The opened bundle.
        right: One entry per question.
        tokens: Average visual tokens over the decoder's layers, by question.
        flops: Of the vision tower and the decoder's prefill, by question.
        milliseconds: Of the same two, by question.
        kept: Tokens kept by site, by question.
        objects: Objects in the picture, by question.
    """

    name: str
    session: edgeprune.Session
    right: list[bool] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)

    def ask(self, image: object, question: str, answer: str, num_objects: int) -> None:
        """Ask one question and keep the score."""
        given = self.session.answer([image], question, edgeprune.SamplingOptions(max_new_tokens=24))
        manifest = self.session.bundle.manifest
        geometry, kept = manifest.geometry, [site.kept for site in given.sites]
        visual = len(given.entering)
        text = given.prompt_tokens - visual
        rows = layer_rows(manifest.sites, geometry.num_layers, visual, kept, text)
        self.right.append(given.text.strip() == answer)
        self.tokens.append(average_visual_tokens(manifest.sites, geometry.num_layers, visual, kept))
        self.flops.append(
            vision_flops(VisionShape.from_geometry(geometry))
            + projector_flops(geometry.projector_sizes, visual)
            + decoder_prefill_flops(DecoderShape.from_geometry(geometry), rows)
        )
        self.milliseconds.append(
            sum(
                ms
                for stage, ms in given.timings_ms.items()
                if stage in ("vision", "projector", "embed", "guide")
                or stage.startswith(("prefill", "select", "gather"))
            )
        )
        self.kept.append(kept)
        self.objects.append(num_objects)


def open_tally(
    name: str,
    checkpoint: Path,
    bundle: Path,
    methods: tuple[PruningMethod, ...] | None,
    clip: Path | None = None,
) -> Tally:
    """Export the example with a method and open the bundle."""
    export(checkpoint, bundle, methods=methods, clip=clip)
    return Tally(name, edgeprune.open_session(bundle))


def planned_average(method: PruningMethod, geometry: ModelGeometry) -> float:
    """Visual tokens of a picture in a decoder layer, averaged over the layers, where counts are fixed."""
    sites = method.decoder_sites(geometry)
    kept = [site.keep_per_image for site in sites if site.keep_per_image is not None]
    entering = method.tokens_per_tile(geometry) or geometry.num_patches
    return average_visual_tokens([site.cut for site in sites], geometry.num_layers, entering, kept)


def nearest_to(average: float, candidates: Iterable[PruningMethod], geometry: ModelGeometry) -> PruningMethod:
    """The candidate whose planned average is nearest, the first of equals."""
    return min(candidates, key=lambda method: abs(planned_average(method, geometry) - average))


def ivtp_candidates(geometry: ModelGeometry) -> list[PruningMethod]:
    """IVTP with the paper's proportions (120 → 64) at every number of tokens after the tower."""
    return [
        Ivtp(
            tokens_after_vision=after_vision,
            tokens_after_decoder=max(1, round(after_vision * 64 / 120)),
            decoder_layers=min(12, geometry.num_layers),
        )
        for after_vision in range(1, geometry.num_patches + 1)
    ]


def ratio_to(tally: Tally, base: Tally) -> float:
    """Median over questions of the time, as a share of another bundle's."""
    return statistics.median(a / b for a, b in zip(tally.milliseconds, base.milliseconds, strict=True))
