"""Checkpoint → bundle: every stage traced, written, checked and compared with the torch reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from PIL import Image

import edgeprune
from edgeprune.bundle import Bundle, file_entry, sha256_of, writing
from edgeprune.checkpoint import PRUNING_FILE, PRUNING_WEIGHTS_FILE, load_checkpoint, read_config
from edgeprune.checkpoint_weights import release_pages, weight_files
from edgeprune.errors import CheckpointError, ParityError, PromptError, PruningError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.export.external_data import WeightStore
from edgeprune.export.input_settings import InputSettings
from edgeprune.export.parity import Prompt, StageCase, check_graph, record_cases, reference_arithmetic
from edgeprune.export.prompt import tokenizer_json_from_checkpoint
from edgeprune.export.trace import trace_stage
from edgeprune.manifest import (
    MANIFEST_FILE,
    FileEntry,
    GeometryEntry,
    GraphEntry,
    Manifest,
    MethodEntry,
    ParityEntry,
    ProbeEntry,
    RateEntry,
    SegmentEntry,
    SiteEntry,
    SourceEntry,
    TensorEntry,
    manifest_to_json,
)
from edgeprune.models.llama import blocks_between
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.registry import methods_to_json
from edgeprune.pruned_model import PrunedModel
from edgeprune.runtimes.guide import GuideEncoder
from edgeprune.runtimes.pictures import PicturePreprocessing
from edgeprune.runtimes.preprocessing_kinds import preprocessing_to_json
from edgeprune.runtimes.prompt import PromptEncoder, PromptFormat
from edgeprune.stages import SegmentStage
from edgeprune.tensor_spec import TensorSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16}
OPSETS = range(20, 24)
# From this opset on ONNX has RotaryEmbedding, RMSNormalization and Attention.
FUSED_OPSET = 23
TOKENIZER_FILE = "tokenizer.json"
GUIDE_TOKENIZER_FILE = "guide_tokenizer.json"
CHECK_QUESTION = "What is in the picture? Name each thing and its colour."


class ExportProgress(Protocol):
    """Hears what an export does; the command line draws a bar per graph from it."""

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        """``done`` of ``steps`` steps of a graph are over; ``step`` is the next or, at the end, the result."""


class SilentProgress:
    """Reports nothing."""

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        """Nothing."""


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    methods: Sequence[PruningMethod] | None = None,
    clip: str | Path | None = None,
    dtype: str = "float32",
    opset: int = FUSED_OPSET,
    images: Sequence[Image.Image] = (),
    progress: ExportProgress | None = None,
) -> Bundle:
    """Export a checkpoint as a bundle.

    Args:
        checkpoint: Folder of a Hugging Face checkpoint, with its pruning files if it was trained with pruning.
        output: Folder of the bundle; an older bundle there is replaced when the new one is whole.
        methods: The pruning to use instead of the checkpoint's; empty = unpruned.
        clip: Folder of the CLIP checkpoint that the vision tower comes from, for IVTP, and for checkpoints that
            LLaVA's own code has saved without their tower.
        dtype: Type of the weights in the bundle, "float32" or "float16".
        opset: ONNX opset, 20 … 23. 23 has fused attention; TensorRT below 10.15 reads up to 20.
        images: Pictures to compare the graphs with the reference on; drawn ones by default.
        progress: Hears what is done.

    Raises:
        CheckpointError: The checkpoint is unusable.
        PruningError: The pruning does not fit the model.
        ParityError: A graph does not compute what the reference computes.
        BundleError: The output cannot be written.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype '{dtype}' is unknown, allowed: {', '.join(DTYPES)}")
    if opset not in OPSETS:
        raise CheckpointError(f"opset {opset} is out of range, allowed: {OPSETS[0]} … {OPSETS[-1]}")
    folder, report = Path(checkpoint), progress or SilentProgress()
    config = read_config(folder, clip)
    settings = InputSettings.from_checkpoint(folder, config, clip)
    model = load_checkpoint(
        folder, methods=methods, clip=clip, dtype=DTYPES[dtype], fused_rotary=opset >= FUSED_OPSET
    )
    with writing(output) as partial:
        tokenizer = partial / TOKENIZER_FILE
        tokenizer.write_text(settings.tokenizer_json, encoding="utf-8")
        probe = _probe_entry(model, clip, partial)
        with reference_arithmetic(model):
            prompts = check_prompts(
                model, settings.preprocessing, settings.prompt_format, partial, probe, images
            )
            cases = record_cases(model, prompts)
        release_pages(model.model.parameters())
        graphs, parity = _export_graphs(model, partial, cases, opset, report)
        manifest = Manifest(
            edgeprune_version=edgeprune.__version__,
            source=SourceEntry(folder.resolve().name, str(config["model_type"]), checkpoint_hash(folder)),
            dtype=dtype,
            opset=opset,
            geometry=_geometry(model),
            pruning=tuple(
                MethodEntry(entry["method"], entry["parameters"])
                for entry in methods_to_json(model.plan.methods)
            ),
            segments=tuple(_segment_entry(segment) for segment in model.segments),
            sites=_site_entries(model),
            probe=probe,
            rate=None if model.rate is None else RateEntry(model.rate.layer, model.rate.num_rates),
            graphs=graphs,
            preprocessing=preprocessing_to_json(settings.preprocessing),
            prompt=settings.prompt_format.to_json(),
            tokenizer=file_entry(partial, tokenizer),
            parity=parity,
        )
        (partial / MANIFEST_FILE).write_text(manifest_to_json(manifest), encoding="utf-8")
    return Bundle.open(output)


def check_prompts(
    model: PrunedModel,
    preprocessing: PicturePreprocessing,
    prompt_format: PromptFormat,
    folder: Path,
    probe: ProbeEntry | None,
    images: Sequence[Image.Image],
) -> list[Prompt]:
    """The prompts that graphs are compared on: one picture, two pictures, none; those that fit the context."""
    encoder = PromptEncoder(prompt_format, folder / TOKENIZER_FILE)
    pictures = (list(images) + check_pictures(2))[:2] if len(images) < 2 else list(images[:2])
    if not model.plan.geometry.fixed_tiles and pictures[0].size == pictures[1].size:
        # Pictures keep their size: graphs are to be seen with two that differ.
        width, height = pictures[1].size
        pictures[1] = pictures[1].crop((0, 0, max(1, width // 2), height))
    guide = None
    if probe is not None and probe.guided:
        guide = GuideEncoder(folder / GUIDE_TOKENIZER_FILE, probe.guide_context_length)
    prompts: list[Prompt] = []
    for count in (1, 2, 0):
        prepared = preprocessing.prepare(pictures[:count], model.plan.geometry.grid) if count else None
        tower = None if prepared is None else model.encode_pictures(prepared)
        try:
            encoded = encoder.encode_chat(
                CHECK_QUESTION, () if tower is None else tower.rows.tokens_per_image
            )
        except PromptError:
            # A short context may not hold two pictures; one it must.
            if count == 1:
                raise
            continue
        prompts.append(
            Prompt(
                f"a prompt with {count or 'no'} picture{'s' * (count != 1)}, {encoded.token_ids.shape[0]} tokens",
                encoded.token_ids,
                prepared,
                guide.encode(encoded.tail_text, encoded.tail_offsets)
                if guide is not None and count
                else None,
            )
        )
    return prompts


def _export_graphs(
    model: PrunedModel,
    folder: Path,
    cases: dict[str, list[StageCase]],
    opset: int,
    progress: ExportProgress,
) -> tuple[dict[str, GraphEntry], dict[str, ParityEntry]]:
    store = WeightStore(folder)
    graphs: dict[str, GraphEntry] = {}
    parity: dict[str, ParityEntry] = {}
    hashes: dict[str, FileEntry] = {}
    for stage in model.stages:
        graph_file = f"{stage.name}.onnx"
        steps = ("trace", "write", "check", "compare")
        progress.graph(stage.name, steps[0], 0, len(steps))
        graph = trace_stage(stage, model.dtype, opset)
        progress.graph(stage.name, steps[1], 1, len(steps))
        ClearMetadataAndDocStringPass()(graph)
        data_files = store.externalise(graph, f"{graph_file}.data")
        ir.save(graph, folder / graph_file)
        del graph
        release_pages(model.model.parameters())
        progress.graph(stage.name, steps[2], 2, len(steps))
        _check_model(folder / graph_file)
        progress.graph(stage.name, steps[3], 3, len(steps))
        parity[stage.name] = check_graph(folder / graph_file, cases.get(stage.name, []), model.dtype)
        progress.graph(stage.name, _summary(parity[stage.name]), len(steps), len(steps))
        for name in data_files:
            hashes.setdefault(name, file_entry(folder, folder / name))
        graphs[stage.name] = GraphEntry(
            file=file_entry(folder, folder / graph_file),
            data=tuple(hashes[name] for name in data_files),
            inputs=tuple(_tensor_entry(spec, model.dtype) for spec in stage.inputs),
            outputs=tuple(_tensor_entry(spec, model.dtype) for spec in stage.outputs),
        )
    return graphs, parity


def _check_model(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(
            f"{path.name} is not valid ONNX ({error}): please report it with config.json"
        ) from error


def _summary(parity: ParityEntry) -> str:
    text = f"max difference {parity.max_abs_diff:.1e} in {parity.cases} runs"
    return text if parity.indices_identical is None else f"{text}, kept indices identical: yes"


def _tensor_entry(spec: TensorSpec, dtype: torch.dtype) -> TensorEntry:
    name = str(dtype).removeprefix("torch.") if spec.dtype == "model" else spec.dtype
    return TensorEntry(spec.name, name, spec.shape)


def _segment_entry(segment: SegmentStage) -> SegmentEntry:
    mlp = tuple(layer for layer, block in blocks_between(segment.start, segment.end) if block == "mlp")
    return SegmentEntry(segment.name, segment.layers, mlp, bool(segment.probe_layers))


def _site_entries(model: PrunedModel) -> tuple[SiteEntry, ...]:
    return tuple(
        SiteEntry(
            graph=planned.name,
            method=planned.method.name,
            place=planned.site.cut.description,
            layer=planned.site.cut.layer,
            before_mlp=planned.site.cut.before_mlp,
            keep_per_image=planned.site.keep_per_image,
            keep_share=planned.site.keep_share,
            positions=planned.site.positions,
            recycled_per_image=planned.site.recycled_per_image,
            merged_per_image=planned.site.merged_per_image,
        )
        for planned in model.plan.sites
    )


def _geometry(model: PrunedModel) -> GeometryEntry:
    config, plan = model.model.config, model.plan
    decoder, geometry, tower = config.decoder, plan.geometry, config.tower_shape
    pruner, tokens = plan.vision_pruner(), geometry.num_patches
    vision_tokens: list[int] = []
    for layer in range(geometry.vision_layers):
        if pruner is not None and (kept := pruner.keep_after_attention(layer)) is not None:
            tokens = kept
        vision_tokens.append(tokens * geometry.patches_per_token + tower.class_tokens)
    typical, entering = config.typical_picture, config.typical_picture.tokens
    if plan.tokens_per_tile is not None:
        entering = min(entering, typical.tiles * plan.tokens_per_tile + typical.inserted)
    return GeometryEntry(
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_layers=decoder.num_layers,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        vocab_size=decoder.vocab_size,
        context_length=decoder.context_length,
        positions=geometry.positions,
        grid=geometry.grid,
        tokens_per_tile=plan.tokens_per_tile,
        typical_tiles=typical.tiles,
        typical_tokens=typical.tokens,
        tokens_per_image=entering,
        vision_hidden_size=tower.hidden_size,
        vision_intermediate_size=tower.intermediate_size,
        vision_mlp_matrices=tower.mlp_matrices,
        vision_layers=geometry.vision_layers,
        vision_class_tokens=tower.class_tokens,
        vision_window=tower.window,
        vision_global_layers=tower.global_layers,
        vision_tokens=tuple(vision_tokens),
        patches_per_token=geometry.patches_per_token,
        projector_sizes=tower.projector_sizes,
    )


def _probe_entry(model: PrunedModel, clip: str | Path | None, folder: Path) -> ProbeEntry | None:
    probe = model.plan.probe
    if probe is None:
        return None
    if not probe.guided or model.clip is None or clip is None:
        return ProbeEntry(guided=False, guide_tokenizer=None, guide_context_length=0)
    if not any((Path(clip) / name).is_file() for name in (TOKENIZER_FILE, "vocab.json")):
        # transformers would make up a tokenizer that knows no word.
        raise PruningError(
            f"{clip} has no tokenizer: save the one of CLIP there with transformers' "
            "AutoTokenizer.from_pretrained(…).save_pretrained"
        )
    tokenizer = folder / GUIDE_TOKENIZER_FILE
    tokenizer.write_text(tokenizer_json_from_checkpoint(Path(clip)), encoding="utf-8")
    length = model.clip.guide.text_tower.config.context_length
    return ProbeEntry(guided=True, guide_tokenizer=file_entry(folder, tokenizer), guide_context_length=length)


def checkpoint_hash(folder: Path) -> str:
    """Hash over a checkpoint's config, weights and pruning files."""
    optional = [folder / PRUNING_FILE, folder / PRUNING_WEIGHTS_FILE]
    files = [folder / "config.json", *weight_files(folder), *(path for path in optional if path.is_file())]
    return sha256_of(*files)
