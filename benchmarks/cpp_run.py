"""The C++ library beside Python's session, on the CPU: opening a bundle, the first token, every further one.

    python benchmarks/cpp_run.py [--bundle DIR] [--rounds 7] [--answers 8] [--tokens 16] [--threads N]

Without a bundle the example is exported. Every round starts a process for each language, and the two programs
edgeprune-run and edgeprune run; they take turns. Answers are greedy and of one length (the end token is ignored), the
first of a process is not counted, and both languages must give the same tokens. Stages are timed by each runtime
itself; opening is timed around the call that opens. Linux only.
Target: C++ is no slower.
"""

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from process_memory import own_memory

if TYPE_CHECKING:
    from edgeprune.runtimes.cpp.build import CppLibrary

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "examples" / "shapes"
PICTURE = EXAMPLE / "pictures" / "scene4.png"
QUESTION = "which letter is in the green diamond?"
LANGUAGES = ("C++", "Python")
STAGES = {"open": "opening", "first": "first token", "token": "each further token"}
MIB = 2**20


def main() -> None:
    """Run the benchmark, or be one of its processes."""
    arguments = _arguments()
    if arguments.child is not None:
        language, bundle, library = arguments.child
        answer = _ask_cpp if language == "C++" else _ask_python
        print(json.dumps(answer(Path(bundle), Path(library), arguments)))
        return
    with contextlib.ExitStack() as stack:
        bundle = arguments.bundle
        if bundle is None:
            from edgeprune.export.exporter import export

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            bundle = export(EXAMPLE / "checkpoint", folder / "shapes").path
        from edgeprune.runtimes.cpp.build import build

        measure(bundle, build(arguments.library), arguments)


def measure(bundle: Path, library: "CppLibrary", arguments: argparse.Namespace, warm_up: int = 1) -> bool:
    """Start processes in turns and print; whether C++ was no slower anywhere."""
    # Not at the top: processes that are measured import neither torch nor the builder.
    from machine import describe_machine, describe_versions
    from turns import ratio, spread, take_turns

    from edgeprune.runtimes.cpp.build import find_onnxruntime

    os.environ["EDGEPRUNE_ONNXRUNTIME"] = str(find_onnxruntime())
    words = ["--image", str(PICTURE), "--prompt", QUESTION, "--max-new-tokens", "1"]
    if arguments.threads:
        words += ["--threads", str(arguments.threads)]
    python_program = [sys.executable, "-m", "edgeprune.cli", "run"]
    languages = {name: partial(_child, name, bundle, library.library, arguments) for name in LANGUAGES}
    programs = {
        "C++": partial(_program, [str(library.runner), str(bundle), *words]),
        "Python": partial(_program, [*python_program, str(bundle), *words]),
    }
    print(describe_machine())
    print(
        f"{describe_versions('onnxruntime')}; threads: {arguments.threads or 'default'}; {arguments.rounds} processes "
        f"of each, in turns; {arguments.answers} answers of {arguments.tokens} tokens in each\n"
    )
    answered = take_turns(languages, arguments.rounds, warm_up)
    started = take_turns(programs, arguments.rounds, warm_up)
    if any(ours["token_ids"] != theirs["token_ids"] for ours, theirs in zip(*answered.values(), strict=True)):
        raise SystemExit("the two languages answer differently: compare them first (tests/runtimes/cpp)")
    rows = {
        title: [[run[stage] for run in answered[name]] for name in LANGUAGES]
        for stage, title in STAGES.items()
    }
    rows["program, start to end of one token"] = [started[name] for name in LANGUAGES]
    print("| ms | C++ | min … max | Python | min … max | C++ / Python | C++ no slower |")
    print("|---|---|---|---|---|---|---|")
    met = True
    for title, (ours, theirs) in rows.items():
        compared = ratio(ours, theirs)
        met = met and compared <= 1
        verdict = "met" if compared <= 1 else "missed"
        print(f"| {title} | {spread(ours, 2)} | {spread(theirs, 2)} | {compared:.3f} | {verdict} |")
    for name in LANGUAGES:
        grown = [
            f"{field} {statistics.median(run[field] for run in answered[name]) / MIB:.1f} MiB"
            for field in ("RssAnon", "RssFile")
        ]
        print(f"\n{name}: opening adds {' and '.join(grown)}")
    return met


def _child(language: str, bundle: Path, library: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of a language measured."""
    command = [sys.executable, __file__, "--child", language, str(bundle), str(library)]
    for name in ("answers", "tokens", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return measured


def _program(command: list[str]) -> float:
    """Milliseconds of a program, from its start to its end."""
    begun = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return 1000 * (time.perf_counter() - begun)


def _summary(opened: float, before: dict[str, int], answers: list[dict[str, Any]]) -> dict[str, Any]:
    counted = answers[1:]
    steps = [answer["timings_ms"]["decode"] / answer["decode_steps"] for answer in counted]
    firsts = [answer["timings_ms"]["time_to_first_token"] for answer in counted]
    return {
        "open": 1000 * opened,
        "first": statistics.median(firsts),
        "token": statistics.median(steps),
        "token_ids": answers[0]["token_ids"],
        **{field: after - before[field] for field, after in _memory().items()},
    }


def _memory() -> dict[str, int]:
    return {field: own_memory(field) for field in ("RssAnon", "RssFile")}


def _ask_python(bundle: Path, _library: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    import edgeprune

    before = _memory()
    begun = time.perf_counter()
    session = edgeprune.open_session(bundle, threads=arguments.threads or None)
    opened = time.perf_counter() - begun
    options = edgeprune.SamplingOptions(max_new_tokens=arguments.tokens, ignore_eos=True)
    answers = [session.answer([PICTURE], QUESTION, options).to_json() for _ in range(arguments.answers + 1)]
    return _summary(opened, before, answers)


class _SessionOptions(ctypes.Structure):
    """edgeprune_session_options."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("backend", ctypes.c_char_p),
        ("provider", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("runtime_library", ctypes.c_char_p),
    )


class _GenerationOptions(ctypes.Structure):
    """edgeprune_generation_options."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("max_new_tokens", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("has_seed", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("stop", ctypes.c_void_p),
        ("num_stop", ctypes.c_size_t),
        ("ignore_eos", ctypes.c_int32),
    )


def _ask_cpp(bundle: Path, library: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The library through its C ABI; what is timed happens inside of it."""
    edgeprune = ctypes.CDLL(str(library))
    edgeprune.edgeprune_last_error.restype = ctypes.c_char_p
    edgeprune.edgeprune_answer_json.restype = ctypes.c_char_p

    def check(status: int) -> None:
        if status != 0:
            raise SystemExit(edgeprune.edgeprune_last_error().decode())

    options, generation = _SessionOptions(), _GenerationOptions()
    edgeprune.edgeprune_session_options_init(ctypes.byref(options))
    # The library fills its own size; a library of another age would not know the fields read here.
    if options.struct_size < ctypes.sizeof(options):
        raise SystemExit("the library is older than this script: build it again")
    options.struct_size, options.threads = ctypes.sizeof(options), arguments.threads
    edgeprune.edgeprune_generation_options_init(ctypes.byref(generation))
    if generation.struct_size < ctypes.sizeof(generation):
        raise SystemExit("the library is older than this script: build it again")
    generation.struct_size = ctypes.sizeof(generation)
    generation.max_new_tokens, generation.ignore_eos = arguments.tokens, 1
    session, picture = ctypes.c_void_p(), ctypes.c_void_p()
    before = _memory()
    begun = time.perf_counter()
    check(edgeprune.edgeprune_session_open(os.fsencode(bundle), ctypes.byref(options), ctypes.byref(session)))
    opened = time.perf_counter() - begun
    answers = []
    for _ in range(arguments.answers + 1):
        answer = ctypes.c_void_p()
        check(edgeprune.edgeprune_picture_read(os.fsencode(PICTURE), ctypes.byref(picture)))
        check(
            edgeprune.edgeprune_ask(
                session,
                ctypes.byref(picture),
                ctypes.c_size_t(1),
                QUESTION.encode(),
                ctypes.byref(generation),
                None,
                None,
                ctypes.byref(answer),
            )
        )
        answers.append(json.loads(edgeprune.edgeprune_answer_json(answer)))
        edgeprune.edgeprune_answer_release(answer)
        edgeprune.edgeprune_picture_release(picture)
    summary = _summary(opened, before, answers)
    edgeprune.edgeprune_session_close(session)
    return summary


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="instead of the example")
    parser.add_argument("--rounds", type=int, default=7, help="processes of each that count")
    parser.add_argument("--answers", type=int, default=8, help="answers of a process that count")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--threads", type=int, default=0, help="of an operator; 0 lets ONNX Runtime choose")
    parser.add_argument(
        "--library", type=Path, default=REPOSITORY / "out" / "cpp", help="the library's build folder"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
