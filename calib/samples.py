"""Calibration data: pictures with a question, read one after the other from a JSONL file or a folder of pictures."""

import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.errors import DataError

FORM = '{"image": "picture.png", "prompt": "What is this?"}'
# What other models take; a vision-language model looks at pictures.
_OTHER_MODALITIES = ("audio", "sound", "speech", "video", "videos", "depth", "point_cloud")
# LLaVA's data marks with this where a picture belongs; its code moves the picture before the text.
_LLAVA_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Sample:
    """A question about pictures.

    Attributes:
        number: Its line in the file, or its place in the folder, from 1.
        name: "line 12", or the name of the picture, for messages.
        pictures: Where its pictures lie, in the order of the prompt; at least one.
        prompt: The question.
        answer: The right answer, if the data says it.
    """

    number: int
    name: str
    pictures: tuple[Path, ...]
    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class BadSample:
    """What cannot be used, and why.

    Attributes:
        number: Its line in the file, or its place in the folder, from 1.
        name: "line 12", or the name of the picture.
        reason: One line: the cause, then the remedy where there is one.
    """

    number: int
    name: str
    reason: str


def read_samples(data: str | Path, prompt: str | None = None) -> Iterator[Sample | BadSample]:
    """Read calibration data; a line that cannot be used is a :class:`BadSample`, and the reading goes on.

    A line of a file is an object ``{"image": PATH or [PATH, …], "prompt": TEXT, "answer": TEXT}``, the answer optional,
    or an entry of LLaVA's training data, ``{"image": PATH, "conversations": [{"from": "human", "value": TEXT}, …]}``,
    of which the first question and its answer are taken. Paths are relative to the file. Empty lines and fields with
    other names are passed over. Pictures are not opened here.

    Args:
        data: A JSONL file, or a folder whose pictures are taken in the order of their names; folders in it are not
            entered.
        prompt: The question about every picture of a folder; for a file it stands in where a line has none.

    Raises:
        DataError: There is no such file or folder, it cannot be read, or a folder comes without a prompt or without
            pictures.
    """
    path = Path(data)
    if prompt is not None and not prompt.strip():
        raise DataError("the prompt is empty: write a question about the pictures")
    if path.is_dir():
        return iter(_read_folder(path, prompt))
    if not path.exists():
        raise DataError(f"{path} does not exist: give a JSONL file of samples or a folder of pictures")
    return _read_lines(path, prompt)


def choose_samples(
    samples: Iterable[Sample | BadSample], count: int | None = None, seed: int = 0
) -> tuple[list[Sample], list[BadSample]]:
    """Draw samples at random, in one pass that holds no more than it draws.

    Each usable sample gets a number of NumPy's PCG64, and those with the smallest are taken: a larger ``count`` with
    the same seed takes the same ones and more.

    Args:
        samples: From :func:`read_samples`.
        count: How many; None takes all.
        seed: Of the draw.

    Returns:
        The samples, in their order in the data, and everything that cannot be used.

    Raises:
        DataError: There is nothing to draw from, or ``count`` is less than 1.
    """
    if count is not None and count < 1:
        raise DataError(f"{count} samples are none: ask for at least 1")
    draw = np.random.Generator(np.random.PCG64(seed))
    bad: list[BadSample] = []
    kept: list[Sample] = []
    # Largest key on top, so that a smaller one replaces it.
    heap: list[tuple[float, int, Sample]] = []
    for sample in samples:
        if isinstance(sample, BadSample):
            bad.append(sample)
        elif count is None:
            kept.append(sample)
        else:
            entry = (-float(draw.random()), -sample.number, sample)
            if len(heap) < count:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
    kept += [sample for _, _, sample in heap]
    if not kept:
        raise DataError(no_samples(bad))
    return sorted(kept, key=lambda sample: sample.number), bad


def no_samples(bad: list[BadSample]) -> str:
    """The message for data that holds nothing usable."""
    if not bad:
        return f"the data holds no samples: write one object per line, {FORM}"
    first = f"{bad[0].name}: {bad[0].reason}"
    return first if len(bad) == 1 else f"none of {len(bad)} samples can be used; {first}"


def _read_folder(folder: Path, prompt: str | None) -> list[Sample | BadSample]:
    if prompt is None:
        raise DataError(f"{folder} is a folder of pictures: say with --prompt what to ask about them")
    suffixes = _picture_suffixes()
    try:
        found = sorted(
            path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file()
        )
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    if not found:
        raise DataError(f"{folder} holds no pictures: give a folder of PNG, JPEG … files or a JSONL file")
    return [Sample(number, path.name, (path,), prompt) for number, path in enumerate(found, 1)]


def _picture_suffixes() -> set[str]:
    """Of the formats that Pillow reads."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def _read_lines(path: Path, prompt: str | None) -> Iterator[Sample | BadSample]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if not text:
                    continue
                name = f"line {number}"
                try:
                    yield _parse(number, name, text, path.parent, prompt)
                except _UnusableError as error:
                    yield BadSample(number, name, str(error))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


class _UnusableError(Exception):
    """Why a line is no sample."""


def _parse(number: int, name: str, line: bytes, folder: Path, prompt: str | None) -> Sample:
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _UnusableError("no UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"no JSON; a line is an object, {FORM}") from error
    if not isinstance(data, dict):
        raise _UnusableError(f"{_kind(data)} instead of an object, {FORM}")
    pictures = _pictures(data, folder)
    if "conversations" in data and "prompt" not in data:
        question, answer = _conversation(data["conversations"])
    else:
        question, answer = data.get("prompt", prompt), data.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise _UnusableError('no question: give it as "prompt"')
    if answer is not None and not isinstance(answer, str):
        raise _UnusableError(f'"answer" is {_kind(answer)} instead of a text')
    return Sample(number, name, pictures, question, answer)


def _pictures(data: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    value = data.get("image", data.get("images"))
    paths = value if isinstance(value, list) else [value]
    if value is None or not paths:
        other = next((kind for kind in _OTHER_MODALITIES if data.get(kind) is not None), None)
        if other is not None:
            raise _UnusableError(f'a sample with "{other}" and no picture: the model looks at pictures')
        raise _UnusableError('no picture: give its path as "image"')
    found = []
    for path in paths:
        if not isinstance(path, str) or not path or "\0" in path:
            raise _UnusableError(f'"image" holds {_kind(path)} instead of a path')
        if path.startswith(("http://", "https://", "data:")):
            raise _UnusableError(f"{path[:60]} is no file: download the picture and give its path")
        found.append(folder / path)
    return tuple(found)


def _conversation(turns: Any) -> tuple[str | None, str | None]:
    """The first question of LLaVA's format and its answer."""
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise _UnusableError('"conversations" is no list of {"from": …, "value": TEXT}')
    spoken = [(turn.get("from"), turn["value"].replace(_LLAVA_PLACEHOLDER, "").strip()) for turn in turns]
    for index, (speaker, text) in enumerate(spoken):
        if speaker in ("human", "user"):
            answer = spoken[index + 1] if index + 1 < len(spoken) else (None, "")
            return text, answer[1] if answer[0] in ("gpt", "assistant") else None
    return None, None


def _kind(value: Any) -> str:
    """The name of a JSON value's type."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return "an empty text" if value == "" else names.get(type(value), "a number")
