"""Bundle → quantized bundle: graph by graph, then both beside each other on the calibration samples."""

import hashlib
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

import edgeprune
from edgeprune.bundle import Bundle, file_entry, writing
from edgeprune.calib.agreement import compare
from edgeprune.calib.graph_quantizer import QuantizedGraph, needs_inputs, quantize_graph, scheme_of
from edgeprune.calib.quantization_options import FEWEST_SAMPLES, QuantizationOptions
from edgeprune.calib.record import sample_sha256
from edgeprune.calib.recorded_inputs import RecordedInputs, RecordingBackend
from edgeprune.calib.samples import BadSample, Sample, choose_samples, read_samples
from edgeprune.errors import DataError, PictureError, PromptError, QuantizationError
from edgeprune.export.external_data import WeightStore
from edgeprune.manifest import MANIFEST_FILE, FileEntry, GraphEntry, Manifest, manifest_to_json
from edgeprune.quantization_entry import (
    FP8,
    INT4,
    QuantizationEntry,
    QuantizationReportEntry,
    QuantizedPartEntry,
)
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session

_SCRATCH = ".scratch-"


class QuantizationProgress(Protocol):
    """Hears what quantizing does; where it raises, nothing is left behind."""

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        """``done`` of ``steps`` steps of a graph, or of a pass over the samples, are over."""

    def bad(self, sample: BadSample) -> None:
        """A sample cannot be used."""


class Silent:
    """Shows nothing."""

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        """See :class:`QuantizationProgress`."""

    def bad(self, sample: BadSample) -> None:
        """See :class:`QuantizationProgress`."""


def quantize(
    bundle: str | Path,
    output: str | Path,
    data: str | Path,
    options: QuantizationOptions | None = None,
    *,
    prompt: str | None = None,
    progress: QuantizationProgress | None = None,
) -> Bundle:
    """Make a quantized bundle of a bundle.

    Weights of matrix products in the segments, and in the vision tower and the projector, are quantized. Graphs that
    score and select, norms, embeddings and attention itself stay as they are, and so do the products whose result
    decides what is kept (:func:`edgeprune.calib.weight_products.deciding_products`).

    Args:
        bundle: Folder of the bundle; it is not changed.
        output: Folder of the quantized one; an older bundle there is replaced when the new one is whole.
        data: A JSONL file or a folder of pictures (:func:`edgeprune.calib.samples.read_samples`).
        options: What to quantize and for which runtime.
        prompt: The question about every picture of a folder.
        progress: Hears what is done.

    Raises:
        QuantizationError: The bundle cannot be quantized as asked.
        DataError: The data is missing, unreadable or too little.
        BundleError: No bundle, or the output cannot be written.
        BackendError: The bundle cannot be run here.
    """
    options, progress = options or QuantizationOptions(), progress or Silent()
    opened = Bundle.open(bundle)
    options.check(opened.manifest)
    if Path(output).resolve() == opened.path.resolve():
        raise QuantizationError(f"{output} is the bundle itself: choose another output folder")
    samples, bad = choose_samples(read_samples(data, prompt), options.samples, options.seed)
    backend = OnnxRuntimeBackend(
        "cpu", options.threads, fuse_qdq=FP8 not in (options.decoder, options.vision)
    )
    with writing(output) as partial:
        with tempfile.TemporaryDirectory(dir=partial, prefix=_SCRATCH) as scratch:
            recorded = _recorders(opened.manifest, options, Path(scratch))
            for sample in bad:
                progress.bad(sample)
            with Session(opened, RecordingBackend(recorded, options.threads)) as session:
                usable, hashed = _usable(session, samples, options, progress)
            made = _quantize_graphs(opened, partial, options, recorded, Path(scratch), progress)
        entry = QuantizationEntry(
            edgeprune_version=edgeprune.__version__,
            form=options.form,
            decoder=_part(options.decoder, options, made.decoder),
            vision=_part(options.vision, options, made.vision),
            data_sha256=hashed,
            samples=len(usable),
            report=_report(opened, Bundle(partial, made.manifest), backend, usable, options, progress),
        )
        text = manifest_to_json(replace(made.manifest, quantization=entry))
        (partial / MANIFEST_FILE).write_text(text, encoding="utf-8")
    return Bundle.open(output)


@dataclass
class _Made:
    """The new graphs.

    Attributes:
        manifest: With the new graphs, quantization aside.
        decoder: What was quantized in the segments.
        vision: What was quantized in tower and projector.
    """

    manifest: Manifest
    decoder: list[QuantizedGraph] = field(default_factory=list)
    vision: list[QuantizedGraph] = field(default_factory=list)


def _precisions(manifest: Manifest, options: QuantizationOptions) -> dict[str, str]:
    """Of the graphs that are to be quantized. A segment without layers has no products."""
    found = {}
    if options.vision is not None:
        found.update(dict.fromkeys(("vision", "projector"), options.vision))
    if options.decoder is not None:
        segments = [s.graph for s in manifest.segments if s.layers or s.mlp_layers]
        found.update(dict.fromkeys(segments, options.decoder))
    return found


def _recorders(manifest: Manifest, options: QuantizationOptions, scratch: Path) -> dict[str, RecordedInputs]:
    return {
        name: RecordedInputs(scratch, name)
        for name, precision in _precisions(manifest, options).items()
        if needs_inputs(precision, options)
    }


def _usable(
    session: Session,
    samples: Sequence[Sample],
    options: QuantizationOptions,
    progress: QuantizationProgress,
) -> tuple[list[Sample], str]:
    """Answer every sample with the unquantized bundle; returns those that can be answered and their hash."""
    usable, digest = [], hashlib.sha256()
    for index, sample in enumerate(samples):
        progress.graph("samples", "answer", index, len(samples))
        try:
            hashed = sample_sha256(sample)
            session.answer(
                sample.pictures, sample.prompt, SamplingOptions(max_new_tokens=options.max_new_tokens)
            )
        except (PictureError, PromptError) as error:
            progress.bad(BadSample(sample.number, sample.name, str(error)))
            continue
        usable.append(sample)
        digest.update(hashed.encode())
    progress.graph("samples", f"{len(usable)} answered", len(samples), len(samples))
    if len(usable) < FEWEST_SAMPLES:
        raise DataError(
            f"{len(usable)} usable samples are too few to quantize with: give at least {FEWEST_SAMPLES}"
        )
    return usable, digest.hexdigest()


def _quantize_graphs(
    bundle: Bundle,
    folder: Path,
    options: QuantizationOptions,
    recorded: dict[str, RecordedInputs],
    scratch: Path,
    progress: QuantizationProgress,
) -> _Made:
    manifest = bundle.manifest
    precisions = _precisions(manifest, options)
    segments = {segment.graph for segment in manifest.segments}
    selecting = [site.graph for site in manifest.sites] + (["rate"] if manifest.rate is not None else [])
    read = {entry.name for name in selecting for entry in manifest.graphs[name].inputs}
    store, hashes, graphs = WeightStore(folder), dict[str, FileEntry](), dict[str, GraphEntry]()
    made = _Made(manifest)
    for name, graph in manifest.graphs.items():
        progress.graph(name, "quantize" if name in precisions else "copy", 0, 2)
        source = bundle.file(graph.file)
        if name in precisions:
            with tempfile.TemporaryDirectory(dir=scratch) as own:
                quantized = quantize_graph(
                    source, precisions[name], options, read, recorded.get(name), Path(own)
                )
            (made.decoder if name in segments else made.vision).append(quantized)
            model = ir.serde.deserialize_model(quantized.model)
            quantized.model.Clear()
            ClearMetadataAndDocStringPass()(model)
        else:
            model = ir.load(source)
        progress.graph(name, "write", 1, 2)
        target = folder / graph.file.path
        data_files = store.externalise(model, f"{target.name}.data")
        ir.save(model, target)
        del model
        _check(target)
        for file in data_files:
            hashes.setdefault(file, file_entry(folder, folder / file))
        graphs[name] = replace(
            graph, file=file_entry(folder, target), data=tuple(hashes[file] for file in data_files)
        )
        progress.graph(name, precisions.get(name, "unchanged"), 2, 2)
    _copy(bundle, folder, manifest)
    made.manifest = replace(
        manifest,
        graphs=graphs,
        # Measured for graphs that are others now.
        parity={name: entry for name, entry in manifest.parity.items() if name not in precisions},
        engines={},
    )
    return made


def _copy(bundle: Bundle, folder: Path, manifest: Manifest) -> None:
    """The files that are no graphs."""
    entries: list[FileEntry] = [manifest.tokenizer]
    if manifest.probe is not None and manifest.probe.guide_tokenizer is not None:
        entries.append(manifest.probe.guide_tokenizer)
    for entry in entries:
        (folder / entry.path).write_bytes(bundle.file(entry).read_bytes())


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        first = str(error).strip().splitlines()[0]
        raise QuantizationError(
            f"{path.name} is not valid ONNX after quantizing ({first}): choose another precision or form"
        ) from error


def _part(
    precision: str | None, options: QuantizationOptions, graphs: Iterable[QuantizedGraph]
) -> QuantizedPartEntry | None:
    if precision is None:
        return None
    all_graphs = list(graphs)
    return QuantizedPartEntry(
        precision=precision,
        scheme=scheme_of(precision, options.form),
        block_size=options.block_size if precision == INT4 else None,
        products=sum(graph.products for graph in all_graphs),
        kept_products=sum(graph.kept_products for graph in all_graphs),
        fp16_bytes=sum(graph.fp16_bytes for graph in all_graphs),
        bytes=sum(graph.bytes for graph in all_graphs),
    )


def _report(
    source: Bundle,
    quantized: Bundle,
    backend: OnnxRuntimeBackend,
    samples: Sequence[Sample],
    options: QuantizationOptions,
    progress: QuantizationProgress,
) -> QuantizationReportEntry:
    """Run both bundles on the samples."""
    with Session(source, backend) as before, Session(quantized, backend) as after:
        agreement = compare(
            after,
            before,
            samples,
            options.max_new_tokens,
            lambda done: progress.graph("compare", "answer", done, len(samples)),
        )
    progress.graph("compare", f"{len(samples)} samples", len(samples), len(samples))
    return QuantizationReportEntry(
        backend=backend.name,
        bundle_bytes_before=sum(entry.bytes for entry in source.manifest.files()),
        bundle_bytes=sum(entry.bytes for entry in quantized.manifest.files()),
        answer_agreement=agreement.answer_agreement(),
        kept_agreement=agreement.kept_agreement(),
        vision_time_ratio=statistics.median(agreement.vision),
        prefill_time_ratio=statistics.median(agreement.prefill),
        decode_time_ratio=statistics.median(agreement.decode) if agreement.decode else None,
    )
