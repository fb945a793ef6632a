"""The command line: every command, its answers, and one line for everything that can go wrong."""

import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import edgeprune
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import BundleError

COMMANDS = (
    "export",
    "run",
    "verify",
    "inspect",
    "calibrate",
    "quantize",
    "fit",
    "build",
    "profile",
    "targets",
    "doctor",
)
QUESTION = "What colour is the circle?"


def invoke(*arguments: str | Path) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line(result: Result, *expected: str) -> None:
    """Exit code 1, nothing on standard output, one line on standard error that holds the texts."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("edgeprune: ")
    for text in expected:
        assert text in line


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture."""
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    pixels = np.random.Generator(np.random.PCG64(3)).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def ask(atp_bundle: Path, picture: Path):
    """``edgeprune run`` with the tiny bundle, the picture and a question."""

    def ask(*arguments: str | Path, prompt: str = QUESTION) -> Result:
        return invoke("run", atp_bundle, "--image", picture, "--prompt", prompt, *arguments)

    return ask


@pytest.fixture
def ask_json(ask):
    """The same with ``--json``, parsed."""

    def ask_json(*arguments: str) -> dict:
        result = ask("--json", *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return ask_json


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_a_command(command, flag):
    result = invoke(command, flag)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {command} ")


def test_help_lists_the_commands():
    assert set(main.commands) == set(COMMANDS)
    result = invoke("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout


def test_version():
    assert invoke("--version").stdout.strip() == f"edgeprune, version {edgeprune.__version__}"


def test_a_wrong_call_is_explained_and_exits_with_2():
    for arguments in (["run"], ["run", "bundle"], ["nothing"], ["doctor", "--nothing"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.stderr


def in_a_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeprune.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_error_is_one_line_without_traceback(tmp_path):
    ran = in_a_process("inspect", tmp_path / "nothing")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        f"edgeprune: {tmp_path / 'nothing'} is not a folder: give a bundle made by edgeprune export\n"
    )


def test_debug_shows_the_traceback(tmp_path):
    ran = in_a_process("--debug", "inspect", tmp_path / "nothing")
    assert ran.returncode == 1
    assert "Traceback (most recent call last):" in ran.stderr
    assert "BundleError" in ran.stderr
    assert isinstance(invoke("--debug", "inspect", tmp_path / "nothing").exception, BundleError)


def test_run_prints_the_answer_and_what_the_sites_did(ask):
    result = ask("--max-new-tokens", "6")
    assert result.exit_code == 0, result.output
    assert result.stdout
    *sites, times = result.stderr.splitlines()
    assert [line.partition(":")[0] for line in sites] == [
        f"site{index}, before layer {index + 1}" for index in range(3)
    ]
    assert all(line.endswith("visual tokens kept") for line in sites)
    assert "prompt tokens; vision " in times
    assert "first token " in times


def test_run_as_json(ask, ask_json):
    answer = ask_json("--max-new-tokens", "6")
    assert answer["text"].lstrip() + "\n" == ask("--max-new-tokens", "6").stdout
    assert len(answer["token_ids"]) <= 6
    tokens = 36
    for index, site in enumerate(answer["sites"]):
        assert (site["name"], site["tokens_in"]) == (f"site{index}", tokens)
        assert site["indices"] == sorted(set(site["indices"]))
        tokens = site["kept"]
        assert len(site["indices"]) == tokens >= 1
    assert tokens < 36
    assert {"vision", "prefill.segment0", "select.site0", "gather.site0", "decode"} <= set(
        answer["timings_ms"]
    )
    assert {"time_to_first_token", "total"} <= set(answer["timings_ms"])


def test_streaming_prints_the_same_text(ask):
    assert ask("--stream", "--max-new-tokens", "12").stdout == ask("--max-new-tokens", "12").stdout


def test_a_stop_text_ends_the_answer(ask_json):
    whole = ask_json("--max-new-tokens", "24")["text"]
    middle = len(whole) // 2
    stop = whole[middle : middle + 2]
    cut = ask_json("--max-new-tokens", "24", "--stop", stop, "--stop", "never said, never met")
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole[: whole.index(stop)]


def test_a_seed_makes_draws_repeatable(ask_json):
    draw = ("--temperature", "1.5", "--max-new-tokens", "10", "--seed")
    assert ask_json(*draw, "7")["token_ids"] == ask_json(*draw, "7")["token_ids"]
    assert ask_json(*draw, "7")["token_ids"] != ask_json(*draw, "8")["token_ids"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_overlay_is_written(ask, tmp_path, suffix):
    path = tmp_path / f"kept{suffix}"
    assert ask("--max-new-tokens", "2", "--overlay", path).exit_code == 0
    with Image.open(path) as overlay:
        # The picture and a panel for each of three sites.
        assert overlay.width > 4 * 300
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_each_picture_has_an_overlay(ask, picture, tmp_path):
    result = ask("--image", picture, "--max-new-tokens", "1", "--overlay", tmp_path / "kept.png")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept-2.png", "kept.png"]


def test_text_alone_has_no_sites(atp_bundle):
    result = invoke("run", atp_bundle, "--prompt", QUESTION, "--json", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sites"] == []


def test_two_pictures(ask, picture):
    result = ask("--image", picture, "--json", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sites"][0]["tokens_in"] == 72


def test_verify(atp_bundle, atp_folder):
    result = invoke("verify", atp_bundle, "--checkpoint", atp_folder)
    assert result.exit_code == 0, result.output
    first, *graphs = result.stdout.splitlines()
    assert first.endswith(" graphs valid")
    assert [line.partition(":")[0] for line in graphs] == list(Bundle.open(atp_bundle).manifest.graphs)


def test_inspect(atp_bundle):
    assert "before layer 2" in invoke("inspect", atp_bundle).stdout
    assert len(json.loads(invoke("inspect", atp_bundle, "--json").stdout)["sites"]) == 3


def test_doctor():
    assert "onnxruntime" in invoke("doctor").stdout
    assert json.loads(invoke("doctor", "--json").stdout)["edgeprune"] == edgeprune.__version__


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"not a picture", "is not a picture that Pillow can read"),
        (b"", "is not a picture that Pillow can read"),
        (png_header(20_000, 20_000), "than the 178956970"),
        (png_header(15_000, 15_000), "than the 178956970"),
        (png_header(40, 40), "is truncated or damaged"),
        (None, "does not exist"),
    ],
    ids=["text", "empty", "bomb", "bomb-below-pillows-limit", "truncated", "missing"],
)
def test_an_unusable_picture(ask, tmp_path, content, expected):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    assert_one_line(ask("--image", path), str(path), expected)


def test_a_folder_is_no_picture(ask, tmp_path):
    assert_one_line(ask("--image", tmp_path), str(tmp_path), "cannot be read")


@pytest.mark.parametrize("prompt", ["<image> <image> what?", "<image><image><image> what?"])
def test_too_many_placeholders(ask, prompt):
    assert_one_line(ask(prompt=prompt), "placeholder")


def test_too_few_placeholders(ask, picture):
    assert_one_line(ask("--image", picture, prompt="<image> what?"), "placeholder")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(ask, prompt):
    assert_one_line(ask(prompt=prompt), "the prompt is empty")


def test_a_prompt_that_does_not_fit(ask):
    assert_one_line(ask("--max-new-tokens", "600"), "context of 512", "shorten")
    assert_one_line(ask(prompt="red circle " * 300), "context of 512", "shorten")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--top-p", "0"), "top_p"),
        (("--top-k", "-1"), "top_k"),
        (("--seed", "-1"), "seed"),
        (("--stop", ""), "stop"),
        (("--provider", "quantum"), "provider 'quantum' is unknown"),
    ],
)
def test_options_out_of_range(ask, arguments, expected):
    assert_one_line(ask(*arguments), expected)


def test_a_file_of_the_bundle_was_changed(atp_bundle, tmp_path):
    bundle = Path(shutil.copytree(atp_bundle, tmp_path / "bundle"))
    graph = bundle / "segment0.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    for command in (["run", bundle, "--prompt", "What?"], ["verify", bundle], ["inspect", bundle]):
        assert_one_line(invoke(*command), str(graph), "changed or truncated", "copy the bundle again")


def test_a_file_of_the_bundle_is_truncated_or_missing(atp_bundle, tmp_path):
    bundle = Path(shutil.copytree(atp_bundle, tmp_path / "bundle"))
    weights = bundle / "segment1.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_one_line(invoke("run", bundle, "--prompt", "What?"), str(weights), "truncated")
    weights.unlink()
    assert_one_line(invoke("run", bundle, "--prompt", "What?"), str(weights), "is missing")


@pytest.mark.parametrize("command", ["run", "verify", "inspect"])
def test_there_is_no_bundle(command, tmp_path):
    more = ["--prompt", "What?"] if command == "run" else []
    assert_one_line(invoke(command, tmp_path / "nothing", *more), "is not a folder")
    assert_one_line(invoke(command, tmp_path, *more), "no manifest.json")


def test_an_overlay_that_cannot_be_written(ask, atp_bundle, tmp_path):
    """Said before the question is answered."""
    (tmp_path / "folder.png").mkdir()
    for path, expected in (
        (tmp_path / "nowhere" / "kept.png", "cannot be written"),
        (tmp_path / "folder.png", "is a folder"),
        (tmp_path / "kept.txt", "no known extension"),
        (tmp_path / "kept", "no known extension"),
    ):
        assert_one_line(ask("--max-new-tokens", "2", "--overlay", path), f"{path} ", expected)
    without = invoke("run", atp_bundle, "--prompt", "What?", "--overlay", tmp_path / "kept.png")
    assert_one_line(without, "--overlay draws on a picture")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--method", "nothing"), "unknown pruning method 'nothing'"),
        (("--method", "atp", "--preset", "nothing"), "unknown preset 'nothing'"),
        (("--method", "random", "--set", "keep"), "--set takes NAME=VALUE"),
        (("--method", "random", "--set", "=3"), "--set takes NAME=VALUE"),
        (("--method", "random", "--set", "keep=many"), "'keep' is 'many', expected int"),
        (("--method", "random", "--set", "width=3"), "unknown parameter 'width'"),
        (("--method", "random", "--set", "keep=37"), "a picture has 36 visual tokens"),
        (("--set", "keep=3"), "name it with --method"),
        (("--method", "ivtp", "--set", "tokens_after_vision=20"), "expected 1 … 20"),
        (("--dtype", "int3"), "dtype 'int3' is unknown"),
        (("--opset", "12"), "opset 12 is out of range"),
        (("--check-image", "missing.png"), "missing.png does not exist"),
    ],
)
def test_an_export_that_cannot_be(atp_folder, tmp_path, arguments, expected):
    assert_one_line(invoke("export", atp_folder, "-o", tmp_path / "bundle", *arguments), expected)
    assert not list(tmp_path.iterdir())


def test_an_export_of_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, expected in (("nothing", "is not a folder"), ("empty", "has no config.json")):
        assert_one_line(invoke("export", tmp_path / folder, "-o", tmp_path / "bundle"), expected)
    assert not (tmp_path / "bundle").exists()


def test_an_export_never_replaces_a_folder_that_is_no_bundle(atp_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert_one_line(invoke("export", atp_folder, "-o", tmp_path), "exists and is no bundle")
    assert (tmp_path / "thesis.txt").is_file()
