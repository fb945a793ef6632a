"""The example quantized: accuracy, agreement of answers and kept tokens, size.

    python benchmarks/quantization.py [--questions 2000] [--workdir DIR]

Exports the example with ATP, quantizes it in every way of ``VARIANTS`` with calibration questions of another seed, and
asks all bundles the same held-out questions in turns. ONNX Runtime on the CPU runs them all; what is quantized for
TensorRT computes the same there, though slowly. Prints Markdown.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from machine import describe_machine
from shapes_tally import EXAMPLE

import edgeprune
from edgeprune.calib.agreement import jaccard
from edgeprune.calib.quantization_options import QuantizationOptions
from edgeprune.calib.quantize import quantize
from edgeprune.export.exporter import export
from edgeprune.quantization_entry import FP8, INT4, INT8, TENSORRT

CALIBRATION_QUESTIONS = 64
VARIANTS = {
    "INT8": QuantizationOptions(INT8, INT8, threads=1),
    "INT4, tower INT8": QuantizationOptions(INT4, INT8, threads=1),
    "INT4": QuantizationOptions(INT4, INT4, threads=1),
    "INT8 for TensorRT": QuantizationOptions(INT8, INT8, TENSORRT, threads=1),
    "INT4, tower INT8 for TensorRT": QuantizationOptions(INT4, INT8, TENSORRT, threads=1),
    "FP8 for TensorRT": QuantizationOptions(FP8, FP8, TENSORRT, threads=1),
}


@dataclass
class Tally:
    """What one bundle answered.

    Attributes:
        session: The opened bundle.
        right: By question: whether the answer is the expected one.
        same: Whether it is the unquantized bundle's.
        kept: By site: Jaccard index of the kept tokens.
    """

    session: edgeprune.Session
    right: list[bool] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    kept: dict[str, list[float]] = field(default_factory=dict)


def main() -> None:
    """Run the benchmark and print its table."""
    arguments = _arguments()
    sys.path.insert(0, str(EXAMPLE))
    with tempfile.TemporaryDirectory() as temporary:
        workdir = arguments.workdir or Path(temporary)
        workdir.mkdir(parents=True, exist_ok=True)
        bundle = workdir / "unquantized"
        if not bundle.is_dir():
            export(EXAMPLE / "checkpoint", bundle)
        data = _write_data(workdir, arguments.seed + 1)
        tallies = {"unquantized": Tally(edgeprune.open_session(bundle, threads=1))}
        for name, options in VARIANTS.items():
            made = workdir / name.replace(" ", "-").replace(",", "")
            if not made.is_dir():
                quantize(bundle, made, data, options)
            tallies[name] = Tally(edgeprune.open_session(made, threads=1))
        _ask(tallies, arguments.questions, arguments.seed)
        _print(tallies, arguments.questions)


def _write_data(workdir: Path, seed: int) -> Path:
    from heldout import held_out_questions

    folder = workdir / "data"
    folder.mkdir(exist_ok=True)
    lines = []
    for index, (image, question, _) in enumerate(held_out_questions(CALIBRATION_QUESTIONS, seed=seed)):
        image.save(folder / f"{index}.png")
        lines.append(
            json.dumps({"image": f"{index}.png", "prompt": question.text, "answer": question.answer})
        )
    (folder / "samples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "samples.jsonl"


def _ask(tallies: dict[str, Tally], questions: int, seed: int) -> None:
    from heldout import held_out_questions

    options = edgeprune.SamplingOptions(max_new_tokens=4)
    for image, question, _ in held_out_questions(questions, seed=seed):
        reference: edgeprune.Answer | None = None
        for tally in tallies.values():
            answer = tally.session.answer([image], question.text, options)
            reference = reference or answer
            tally.right.append(answer.text.strip() == question.answer)
            tally.same.append(answer.token_ids == reference.token_ids)
            for site, other in zip(answer.sites, reference.sites, strict=True):
                tally.kept.setdefault(site.name, []).append(jaccard(site.indices, other.indices))


def _print(tallies: dict[str, Tally], questions: int) -> None:
    base = tallies["unquantized"]
    sites = list(base.kept)
    print(f"{questions} held-out questions; {describe_machine()}.\n")
    titles = ["", "accuracy", "of unquantized", "same answer", *(f"Jaccard {site}" for site in sites)]
    titles += ["quantized weights of float16", "bundle MB"]
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    for name, tally in tallies.items():
        accuracy, full = statistics.fmean(tally.right), statistics.fmean(base.right)
        manifest = tally.session.bundle.manifest
        weights = "-"
        if manifest.quantization is not None:
            parts = [part for part in (manifest.quantization.decoder, manifest.quantization.vision) if part]
            weights = ", ".join(f"{part.precision} {part.bytes / part.fp16_bytes:.3f}" for part in parts)
        row = [name, f"{accuracy:.2%}", f"{accuracy / full:.2%}", f"{statistics.fmean(tally.same):.2%}"]
        row += [f"{statistics.fmean(tally.kept[site]):.3f}" for site in sites]
        row += [weights, f"{sum(entry.bytes for entry in manifest.files()) / 1e6:.2f}"]
        print(f"| {' | '.join(row)} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=2000, help="held-out questions")
    parser.add_argument("--seed", type=int, default=2024, help="seed of the questions")
    parser.add_argument("--workdir", type=Path, help="keep the bundles here and reuse them")
    return parser.parse_args()


if __name__ == "__main__":
    main()
