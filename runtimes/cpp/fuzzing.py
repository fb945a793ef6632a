"""Fuzzing the C++ library's readers: libFuzzer's three targets at once, from a corpus of real files.

``python -m edgeprune.runtimes.cpp.fuzzing BUNDLE [--seconds 60] [--output out/cpp-fuzz]``

Needs clang with its compiler-rt. What the targets find useful is kept in the output folder's ``corpus``; an input that
they fail on is written to its ``findings`` and named.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import BackendError, EdgepruneError
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.runtimes.cpp.build import build_fuzzers

# Of an input, in bytes: longer ones are slower, and no other.
LONGEST = {"manifest": 32768, "tokenizer": 16384, "picture": 4096}
# Of one input.
SECONDS_OF_AN_INPUT = 20
MEGABYTES = 2048
TEXT = "which letter is in the green diamond? Größe don't 1234 猫 🙂 <image> \t…"

# The smallest tokenizer with each component that is read; the components of a bundle's own are beside them.
TINY_TOKENIZERS: tuple[dict[str, Any], ...] = (
    {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": ["a b"]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": True},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 4, "content": "<image>", "special": True, "lstrip": True}],
    },
    {
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "<0xC3>": 4, "<0xB6>": 5},
            "merges": [["▁", "a"]],
        },
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<unk>"}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {"<unk>": {"ids": [0]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    },
    {
        "model": {
            "end_of_word_suffix": "</w>",
            "vocab": {"a": 0, "a</w>": 1, "b": 2, "ba</w>": 3},
            "merges": ["b a</w>"],
        },
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": "'s|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+|(?i:x){1,3}|\\s+(?!\\S)"},
                    "behavior": "Removed",
                    "invert": True,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "cls": ["a", 0],
            "sep": ["b", 2],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
    },
    {
        "model": {"ignore_merges": True, "vocab": {"▁ab": 0, "a": 1}, "merges": []},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "added_tokens": [{"id": 9, "content": "ab", "single_word": True, "rstrip": True, "normalized": True}],
    },
)


@dataclass(frozen=True)
class FuzzRun:
    """What a target did.

    Attributes:
        name: "manifest", "tokenizer" or "picture".
        executions: Inputs that were tried.
        finding: The last lines of a target that failed; None where it did not.
    """

    name: str
    executions: int
    finding: str | None


def write_seeds(bundle: Path, folder: Path) -> None:
    """A folder of seeds for every target: a bundle's own files, tiny tokenizers, generated pictures.

    Args:
        bundle: A bundle.
        folder: Its subfolders are named as the targets.

    Raises:
        BackendError: The bundle lacks a file.
    """
    try:
        manifest = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
        own = json.loads((bundle / manifest["tokenizer"]["path"]).read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError) as error:
        raise BackendError(
            f"{bundle} gives no seeds ({error}): name a bundle made by edgeprune export"
        ) from error
    seeds: dict[str, list[bytes]] = {"manifest": [_compact(manifest)], "picture": picture_files()}
    # Without the tensors of the graphs, of which one is like the other.
    for graph in manifest["graphs"].values():
        graph |= {"inputs": graph["inputs"][:1], "outputs": graph["outputs"][:1]}
    seeds["manifest"].append(_compact(manifest))
    seeds["tokenizer"] = [
        _compact(tokenizer) + b"\n" + TEXT.encode() for tokenizer in (own, *TINY_TOKENIZERS)
    ]
    for name, contents in seeds.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, content in enumerate(contents):
            (folder / name / str(index)).write_bytes(content)


def picture_files() -> list[bytes]:
    """Small PNG and JPEG files of every mode, some turned by EXIF."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    turned = Image.Exif()
    turned[0x0112] = 6
    made: list[tuple[Image.Image, dict[str, Any]]] = [
        (picture.convert(mode), {"format": "PNG"}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")
    ]
    made.append((Image.fromarray(noise[..., 0].astype(np.uint16) * 2), {"format": "PNG"}))
    made.append((picture.convert("RGB").quantize(4), {"format": "PNG", "transparency": 1}))
    made += [(picture.convert("RGB"), {"format": kind, "exif": turned}) for kind in ("PNG", "JPEG")]
    for mode in ("RGB", "L", "CMYK"):
        made += [(picture.convert(mode), {"format": "JPEG", "progressive": slow}) for slow in (False, True)]
    files = []
    for image, options in made:
        file = io.BytesIO()
        image.save(file, **options)
        files.append(file.getvalue())
    return files


def fuzz(programs: Mapping[str, Path], output: Path, seconds: int) -> list[FuzzRun]:
    """Run every target for some time, side by side.

    Args:
        programs: Of :func:`edgeprune.runtimes.cpp.build.build_fuzzers`.
        output: Holds ``seeds``; gets ``corpus``, ``findings`` and a log of every target.
        seconds: Of each.
    """
    findings = output / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    running = {}
    for name, program in programs.items():
        corpus = output / "corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)
        options = {
            "max_total_time": seconds,
            "timeout": SECONDS_OF_AN_INPUT,
            "rss_limit_mb": MEGABYTES,
            "max_len": LONGEST[name],
            "artifact_prefix": f"{findings}/{name}-",
            "print_final_stats": 1,
        }
        command = [str(program), *(f"-{option}={value}" for option, value in options.items())]
        log = (output / f"{name}.log").open("w+", encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [*command, str(corpus), str(output / "seeds" / name)], stdout=log, stderr=subprocess.STDOUT
        )
        running[name] = (process, log)
    runs = []
    for name, (process, log) in running.items():
        status = process.wait()
        with log:
            log.seek(0)
            lines = log.read().splitlines()
        executed = [line.rpartition(" ")[2] for line in lines if "number_of_executed_units" in line]
        finding = None if status == 0 else "\n".join(lines[-40:])
        runs.append(FuzzRun(name, int(executed[-1]) if executed else 0, finding))
    return runs


def _compact(data: object) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fuzz the C++ library's readers.")
    parser.add_argument("bundle", type=Path, help="its files are seeds")
    parser.add_argument("--seconds", type=int, default=60, help="of every target")
    parser.add_argument(
        "--output", type=Path, default=Path("out/cpp-fuzz"), help="build folder, corpus, findings"
    )
    arguments = parser.parse_args()
    try:
        programs = build_fuzzers(arguments.output)
        shutil.rmtree(arguments.output / "seeds", ignore_errors=True)
        write_seeds(arguments.bundle, arguments.output / "seeds")
    except EdgepruneError as error:
        sys.exit(f"edgeprune: {error}")
    runs = fuzz(programs, arguments.output, arguments.seconds)
    for run in runs:
        verdict = "no finding" if run.finding is None else f"a finding:\n{run.finding}"
        sys.stdout.write(f"{run.name}: {run.executions} inputs in {arguments.seconds} s, {verdict}\n")
    if any(run.finding is not None for run in runs):
        sys.exit(
            f"edgeprune: the inputs are in {arguments.output / 'findings'}: mend what they show, and test it"
        )


if __name__ == "__main__":
    main()
