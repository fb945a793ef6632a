"""``edgeprune calibrate``: what it prints, what it refuses, and Ctrl-C."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from noise_data import write_data
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.cli import main


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["calibrate", *(str(argument) for argument in arguments)])


@pytest.fixture
def bundle(atp_bundle, tmp_path) -> Path:
    """A copy of the bundle with three sites."""
    return Path(shutil.copytree(atp_bundle, tmp_path / "atp"))


def test_a_table_a_plot_and_the_manifest(bundle, tmp_path):
    data = write_data(tmp_path / "data", 6)
    data.write_text(data.read_text() + '{"image": \n')
    plot = tmp_path / "plot.png"
    result = invoke(bundle, "--data", data, "--max-new-tokens", 1, "--profiles", 2, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "Calibration: 6 samples, 1 skipped" in result.stdout
    assert "site2: visual tokens kept per picture" in result.stdout
    assert "Profiles of prefill" in result.stdout
    errors = result.stderr.splitlines()
    assert errors[0].startswith("skipped line 7: no JSON")
    assert errors[-2:] == ["calibrate: 6 of 6 samples", "samples skipped: 1"]
    assert max(len(line) for line in result.stdout.splitlines()) <= 110
    assert Image.open(plot).width == 960
    calibration = Bundle.open(bundle).manifest.calibration
    assert calibration is not None
    assert calibration.samples == 6


def test_a_folder_of_pictures_with_one_prompt(bundle, tmp_path):
    write_data(tmp_path / "data", 5)
    arguments = (bundle, "--data", tmp_path / "data", "--prompt", "What?", "--max-new-tokens", 1)
    assert invoke(*arguments, "--samples", 3, "--seed", 2).exit_code == 0
    calibration = Bundle.open(bundle).manifest.calibration
    assert calibration is not None
    assert calibration.samples == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.jsonl"), "none.jsonl does not exist"),
        (("--data", "empty.jsonl"), "the data holds no samples"),
        (("--data", "sounds.jsonl"), 'line 1: a sample with "audio" and no picture'),
        (("--data", "."), "say with --prompt what to ask"),
        ((), "not calibrated yet"),
        (
            ("--data", "one.jsonl", "--quantiles", "0.9"),
            "the 0.9 quantile needs at least 10 samples, there are 1",
        ),
        (("--data", "one.jsonl", "--quantiles", "x"), "are no numbers"),
        (("--data", "one.jsonl", "--profiles", "0"), "--profiles is 0"),
        (("--data", "one.jsonl", "--samples", "0"), "--samples is 0"),
        (("--data", "one.jsonl", "--latency", "none.json"), "none.json does not exist"),
        (("--data", "one.jsonl", "--plot", "plot.pdf"), "is no PNG"),
        (("--data", "one.jsonl", "--workers", "2"), "give --ray, too"),
        (("--data", "one.jsonl", "--provider", "tpu"), "provider 'tpu' is unknown"),
        (("--data", "one.jsonl", "--backend", "magic"), "backend 'magic' is unknown"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(bundle, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("a.png")
    Path("empty.jsonl").write_text("\n")
    Path("sounds.jsonl").write_text('{"audio": "a.wav", "prompt": "Who?"}\n')
    Path("one.jsonl").write_text('{"image": "a.png", "prompt": "What?"}\n')
    result = invoke("atp", *arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("edgeprune: ")]
    assert message in line
    assert Bundle.open(bundle).manifest.calibration is None
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_leaves_the_bundle_and_the_same_command_goes_on(bundle, tmp_path):
    data = write_data(tmp_path / "data", 40)
    arguments = ["calibrate", str(bundle), "--data", str(data), "--max-new-tokens", "16"]
    manifest = (bundle / "manifest.json").read_text()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeprune.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore Ctrl-C, and their children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if any(path.read_bytes().count(b"\n") >= 3 for path in tmp_path.glob(".atp.calibration-*")):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on there" in errors
    assert (bundle / "manifest.json").read_text() == manifest
    (journal,) = tmp_path.glob(".atp.calibration-*")
    done = len(journal.read_text().splitlines())
    assert 3 <= done < 40
    # Whoever is killed while writing leaves half of a line.
    journal.write_text(journal.read_text() + '{"sample_sha')
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert f"calibrate: {done} of 40 samples" in result.stderr or done < 4
    assert json.loads((bundle / "manifest.json").read_text())["calibration"]["samples"] == 40
    assert not list(tmp_path.glob(".*"))
