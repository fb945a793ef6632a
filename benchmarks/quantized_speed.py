"""Prefill and decode of quantized bundles, unpruned and pruned by ATP: what INT8 and INT4 save, and pruning on top.

    python benchmarks/quantized_speed.py [--rounds 5] [--workdir DIR]

The random LLaVA of prefill.py (the same --workdir serves both), one picture, 576 visual + 64 text tokens. Its float32
bundles are quantized for ONNX Runtime, decoder and tower alike, with random pictures: nothing is said about answers
(benchmarks/quantization.py does that). Only the decoder is measured. All bundles run in turn in every round.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from decoders import BundleDecoder, RandomPrompt, open_chain
from machine import describe_machine, describe_versions
from PIL import Image
from pruned_bundles import prepare
from random_llava import LlavaSize
from turns import ratio, spread, take_turns

from edgeprune.calib.quantization_options import FEWEST_SAMPLES, QuantizationOptions
from edgeprune.calib.quantize import quantize
from edgeprune.prune.method import PruningMethod
from edgeprune.quantization_entry import INT4, INT8

UNPRUNED, PRUNED = "unpruned", "ATP"
BUNDLES: dict[str, list[PruningMethod] | None] = {UNPRUNED: [], PRUNED: None}
FLOAT32 = "float32"
PRECISIONS = {"INT8": INT8, "INT4": INT4}


def main() -> None:
    """Run the benchmark and print its table."""
    arguments = _arguments()
    size = LlavaSize(num_layers=arguments.layers, hidden_size=arguments.hidden)
    keep = [int(count) for count in arguments.keep.split(",")]
    if arguments.workdir is not None:
        measure(arguments.workdir, size, keep, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as workdir:
        measure(Path(workdir), size, keep, arguments.rounds)


def measure(workdir: Path, size: LlavaSize, keep: Sequence[int], rounds: int) -> None:
    """Build, export, quantize and measure; what is in ``workdir`` already is used again."""
    prepare(workdir, size, keep, BUNDLES)
    folders = {(FLOAT32, name): workdir / name.lower() for name in BUNDLES}
    for precision, value in PRECISIONS.items():
        for name in BUNDLES:
            folders[precision, name] = folder = workdir / f"{name.lower()}-{precision.lower()}"
            if not folder.is_dir():
                options = QuantizationOptions(value, value, samples=FEWEST_SAMPLES, max_new_tokens=2)
                quantize(workdir / name.lower(), folder, _random_pictures(workdir, size), options)
    chains = {key: open_chain(folder) for key, folder in folders.items()}
    image_token = int(chains[FLOAT32, UNPRUNED].manifest.prompt["image_token_id"])
    prompt = RandomPrompt(size, image_token)
    decoders = {key: BundleDecoder(chain, prompt) for key, chain in chains.items()}
    candidates = {("prefill", key): decoder.prefill for key, decoder in decoders.items()}
    candidates |= {("decode", key): decoder.decode for key, decoder in decoders.items()}
    times = take_turns(candidates, rounds)
    print(describe_machine())
    print(
        f"{describe_versions('onnxruntime')}; {size.num_layers} layers, width {size.hidden_size}; {prompt.rows} rows; "
        f"medians of {rounds} interleaved rounds\n"
    )
    heads = ["weights", "bundle", "kept", "FLOPs of unpruned"]
    for what in ("prefill ms", "decode ms/token"):
        heads += [what, "min … max", "of float32", "of unpruned"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for precision, name in decoders:
        decoder = decoders[precision, name]
        share = decoder.flops() / decoders[precision, UNPRUNED].flops()
        cells = [precision, name, ", ".join(map(str, decoder.kept())) or "-", f"{share:.3f}"]
        for what in ("prefill", "decode"):
            measured = times[what, (precision, name)]
            cells += [spread(measured), f"{ratio(measured, times[what, (FLOAT32, name)]):.3f}"]
            cells.append(f"{ratio(measured, times[what, (precision, UNPRUNED)]):.3f}")
        print(f"| {' | '.join(cells)} |")


def _random_pictures(workdir: Path, size: LlavaSize) -> Path:
    """Write samples to quantize with."""
    generator = np.random.default_rng(0)
    folder = workdir / "pictures"
    folder.mkdir(exist_ok=True)
    lines = []
    for index in range(FEWEST_SAMPLES):
        pixels = generator.integers(0, 256, (size.image_size, size.image_size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "prompt": "what is this?"}))
    samples = folder / "samples.jsonl"
    samples.write_text("\n".join(lines), encoding="utf-8")
    return samples


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--keep", default="126,88,20", help="visual tokens kept at ATP's three sites")
    parser.add_argument("--layers", type=int, default=24, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the decoder")
    parser.add_argument(
        "--workdir", type=Path, help="keep the checkpoint and the bundles here (8 GB) and reuse them"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
