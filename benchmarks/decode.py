"""Tokens per second against the length of the cache: unpruned, ATP and DyRate.

    python benchmarks/decode.py [--lengths 640,1216,2368,4096] [--steps 32] [--workdir DIR]

The random LLaVA of prefill.py (the same --workdir serves both), float32. Prompts grow by whole pictures of 576 visual
tokens beside 64 text tokens, so that there is something to prune at every length. After its prefill, which is not
timed, each bundle generates a token in turn, ``--steps`` times after one that does not count. ATP's thresholds let
exactly the asked counts of one picture survive. DyRate's predictor is chosen, not learned: half of the visual tokens go
in prefill, and a tenth more for every two percent of its attention that the answer has; its time contains what it drops
while it generates.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from decoders import BundleDecoder, open_chain, prompt_of_rows
from machine import describe_machine, describe_versions
from pruned_bundles import prepare
from random_llava import LlavaSize
from turns import ratio, take_turns

from edgeprune.prune.dyrate import DyRate
from edgeprune.prune.method import PruningMethod

UNPRUNED = "unpruned"
METHODS: dict[str, list[PruningMethod] | None] = {UNPRUNED: [], "ATP": None, "DyRate": [DyRate()]}


def main() -> None:
    """Run the benchmark and print its table."""
    arguments = _arguments()
    keep, lengths = (
        [int(value) for value in text.split(",")] for text in (arguments.keep, arguments.lengths)
    )
    size = LlavaSize(num_layers=arguments.layers, hidden_size=arguments.hidden)
    if arguments.workdir is not None:
        measure(arguments.workdir, size, keep, lengths, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as workdir:
        measure(Path(workdir), size, keep, lengths, arguments.steps)


def measure(workdir: Path, size: LlavaSize, keep: Sequence[int], lengths: Sequence[int], steps: int) -> None:
    """Build, export and measure; what is in ``workdir`` already is used again."""
    prepare(workdir, size, keep, METHODS)
    chains = {name: open_chain(workdir / name.lower()) for name in METHODS}
    image_token = int(chains[UNPRUNED].manifest.prompt["image_token_id"])
    print(describe_machine())
    print(
        f"{describe_versions('onnxruntime')}; {size.num_layers} layers, width {size.hidden_size}, float32; medians of "
        f"{steps} tokens, one of each bundle in turn\n"
    )
    print("| rows of the prompt | bundle | rows cached | tok/s | least … most | of unpruned | kept |")
    print("|---|---|---|---|---|---|---|")
    for rows in lengths:
        prompt = prompt_of_rows(size, image_token, rows)
        decoders = {name: BundleDecoder(chain, prompt, steps + 1) for name, chain in chains.items()}
        for decoder in decoders.values():
            decoder.prefill()
        times = take_turns({name: decoder.step for name, decoder in decoders.items()}, steps)
        for name, decoder in decoders.items():
            print(f"| {' | '.join(_cells(rows, name, decoder, times))} |", flush=True)


def _cells(rows: int, name: str, decoder: BundleDecoder, times: dict[str, list[float]]) -> list[str]:
    rates = [1000 / ms for ms in times[name]]
    kept = [str(report.kept) for report in decoder.chain.site_reports(decoder.sequence)]
    evictions = [
        f"{left} at token {generated}"
        for report in decoder.chain.site_reports(decoder.sequence)
        for generated, left in report.evictions
    ]
    speed_up = 1 / ratio(times[name], times[UNPRUNED])
    return [
        str(rows),
        name,
        f"{decoder.cached_rows():.0f}",
        f"{statistics.median(rates):.1f}",
        f"{min(rates):.1f} … {max(rates):.1f}",
        f"{speed_up:.3f}",
        "; ".join([", ".join(kept) or "-", *evictions]),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="640,1216,2368,4096", help="rows of the prompts")
    parser.add_argument("--steps", type=int, default=32, help="measured tokens of every bundle and length")
    parser.add_argument("--keep", default="126,88,20", help="visual tokens kept at ATP's three sites")
    parser.add_argument("--layers", type=int, default=24, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the decoder")
    parser.add_argument(
        "--workdir", type=Path, help="keep the checkpoint and the bundles here (8 GB) and reuse them"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
