import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fit_data import write_data
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoints import TINY
from tiny_llava_layout import build_both

from edgeprune.calib.atp_trainer import ANNEALED, AtpTrainer
from edgeprune.calib.fit import FitOptions, SilentProgress, choose_method, fit
from edgeprune.calib.processes import OneProcess
from edgeprune.calib.token_target import TokenTarget
from edgeprune.calib.training import Split, TrainingOptions, train
from edgeprune.calib.training_data import TrainingData
from edgeprune.calib.training_state import StateStore
from edgeprune.checkpoint import load_checkpoint, read_config
from edgeprune.cli import main
from edgeprune.errors import DataError
from edgeprune.export.input_settings import InputSettings
from edgeprune.prune.dyrate import DyRate

LAYERS = "layers=[1,2,3]"
HALF = TokenTarget(0.5, is_share=True)
SMALL = FitOptions(HALF, steps=6, batch_size=4, save_every=2, device="cpu")


# --- helpers ------------------------------------------------------------------------------------------------


class Stopping(SilentProgress):
    """Presses Ctrl-C behind a step."""

    def __init__(self, at):
        self.at = at

    def step(self, done, *_):
        if done == self.at:
            raise KeyboardInterrupt


class Listening(SilentProgress):
    """Remembers what it hears."""

    def __init__(self):
        self.skipped = []

    def bad(self, sample):
        self.skipped.append(f"{sample.name}: {sample.reason}")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def atp(folder, *settings):
    return choose_method(folder, "atp", None, (LAYERS, "hidden_width=4", *settings))


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "pruning.safetensors"), **load_file(folder / "model.safetensors")}


def run_cli(*arguments):
    return CliRunner().invoke(main, ["fit", *map(str, arguments)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fitted(llava_folder, data, tmp_path_factory):
    """ATP's heads, fitted for a while."""
    folder = tmp_path_factory.mktemp("fitted") / "atp"
    before = hashes(llava_folder)
    result = fit(
        llava_folder,
        data,
        folder,
        atp(llava_folder),
        dataclasses.replace(SMALL, target=TokenTarget(28), steps=40, batch_size=8),
    )
    assert hashes(llava_folder) == before
    return result


# --- what comes out -----------------------------------------------------------------------------------------


def test_the_running_count_ends_at_the_target(fitted):
    assert fitted.target == 28
    assert fitted.unpruned_tokens == TINY.num_patches
    assert np.mean(fitted.curves.tokens[-8:]) == pytest.approx(28, rel=0.1)
    assert fitted.tokens == pytest.approx(28, rel=0.1)


def test_the_budget_pulls_the_count_to_the_target(model, llava_folder, data, tmp_path):
    # So far from the target, only soft masks have a gradient everywhere.
    training = dataclasses.replace(
        ANNEALED, target_tokens=26, learning_rate=0.005, temperature_start=20, temperature_end=20
    )
    trainer = AtpTrainer(model.model, atp(llava_folder), training, TINY.num_patches)
    trainer.start_counts = (12, 6, 2)
    examples = training_data(model, llava_folder, data)
    options = TrainingOptions(60, 8, seed=0, decoder_learning_rate=1e-5, save_every=100)
    nothing = StateStore(tmp_path / "none", {})
    alone = OneProcess(torch.device("cpu"))
    curves = train(trainer, {}, examples, Split.of(24, 0), options, alone, nothing, SilentProgress())
    assert curves.tokens[0] < 18
    assert np.mean(curves.tokens[-8:]) == pytest.approx(26, rel=0.1)
    budget = np.array(curves.budget)
    assert budget[-8:].mean() < 0.5 * budget[0]


def test_the_new_checkpoint_prunes_as_was_measured(fitted, data):
    pruned = load_checkpoint(fitted.path, dtype=torch.float32)
    settings = InputSettings.from_checkpoint(fitted.path, read_config(fitted.path))
    encoder = settings.prompt_encoder()
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    tokens = []
    for index in Split.of(len(lines), 0).held_out:
        picture = Image.open(data.parent / lines[index]["image"])
        prepared = settings.preprocessing.prepare([picture], pruned.plan.geometry.grid)
        ids = encoder.encode_chat(lines[index]["prompt"], prepared.layout.tokens_per_image).token_ids
        kept = [site.kept for site in pruned.prefill(ids, prepared).sites]
        tokens.append((TINY.num_patches + sum(kept)) / TINY.layers)
    assert np.mean(tokens) == pytest.approx(fitted.tokens, abs=1e-4)


def test_the_new_checkpoint_holds_the_original_beside_the_heads(fitted, llava_folder):
    new, old = hashes(fitted.path), hashes(llava_folder)
    assert new.items() >= old.items()
    assert set(new) - set(old) == {"pruning.json", "pruning.safetensors", "training.json", "training.png"}
    assert not fitted.path.with_name("atp.training").exists()


def test_curves_are_written(fitted):
    told = json.loads((fitted.path / "training.json").read_text())
    assert told["curves"]["tokens"] == fitted.curves.tokens
    assert len(told["curves"]["answers"]) == 40
    assert told["held_out"]["tokens"] == fitted.tokens
    with Image.open(fitted.path / "training.png") as plot:
        assert plot.size[0] > 500


def test_it_exports_with_parity(llava_folder, data, tmp_path):
    method = choose_method(llava_folder, "atp", None, ("layers=[1]", "hidden_width=4"))
    result = fit(llava_folder, data, tmp_path / "fitted", method, dataclasses.replace(SMALL, steps=2))
    exported = CliRunner().invoke(main, ["export", str(result.path), "-o", str(tmp_path / "bundle")])
    assert exported.exit_code == 0, exported.output
    assert "kept indices identical: yes" in exported.output


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_language_model_that_learns_answers_better_and_its_tower_stays(
    llava_folder, data, tmp_path, precision
):
    options = dataclasses.replace(
        SMALL, steps=30, batch_size=8, trainable="all", decoder_learning_rate=0.01, precision=precision
    )
    result = fit(llava_folder, data, tmp_path / "out", atp(llava_folder), options)
    answers = result.curves.answers
    assert np.mean(answers[-5:]) < 0.5 * np.mean(answers[:5])
    old, new = (load_file(folder / "model.safetensors") for folder in (llava_folder, result.path))
    assert {n: (t.shape, t.dtype) for n, t in old.items()} == {n: (t.shape, t.dtype) for n, t in new.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert not any("vision" in name or "projector" in name for name in changed)
    assert all("language_model" in name or "lm_head" in name for name in changed)
    again = load_checkpoint(result.path, dtype=torch.float32)
    assert again.plan.methods == (result.method,)


def test_frozen_weights_in_bfloat16_do(llava_folder, data, tmp_path):
    options = dataclasses.replace(SMALL, precision="bfloat16")
    result = fit(llava_folder, data, tmp_path / "out", atp(llava_folder), options)
    assert np.isfinite(result.curves.answers).all()
    assert result.tokens == pytest.approx(18, rel=0.25)
    weights = load_file(result.path / "pruning.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_dyrates_predictor_learns_the_target(llava_folder, data, tmp_path):
    method = choose_method(llava_folder, "dyrate", None, ("layer=1", "num_rates=8"))
    options = dataclasses.replace(SMALL, steps=30, batch_size=6)
    result = fit(llava_folder, data, tmp_path / "out", method, options)
    assert isinstance(result.method, DyRate)
    # A rate is a step of 36·3/4·1/8 = 3.4 tokens on average over the layers.
    assert result.tokens == pytest.approx(18, abs=3.4)
    assert np.mean(result.curves.tokens[-10:]) == pytest.approx(18, abs=3.4)
    assert np.ptp(load_file(result.path / "pruning.safetensors")["dyrate.predictor.weight"].numpy()) > 0
    assert load_checkpoint(result.path).rate is not None


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "trainable"), [("atp", "heads"), ("atp", "all"), ("dyrate", "heads")])
@pytest.mark.parametrize("at", [3, 4])
def test_a_resumed_training_ends_as_an_uninterrupted_one(llava_folder, data, tmp_path, name, trainable, at):
    method = atp(llava_folder) if name == "atp" else DyRate(layer=1)
    options = dataclasses.replace(SMALL, trainable=trainable, decoder_learning_rate=1e-3)
    whole = fit(llava_folder, data, tmp_path / "whole", method, options)
    with pytest.raises(KeyboardInterrupt):
        fit(llava_folder, data, tmp_path / "parts", method, options, progress=Stopping(at))
    assert not (tmp_path / "parts").exists()
    assert sorted(path.name for path in (tmp_path / "parts.training").iterdir()) == [
        f"state-{at}.safetensors",
        "state.json",
    ]
    parts = fit(llava_folder, data, tmp_path / "parts", method, options)
    assert parts.curves == whole.curves
    expected, got = learned(whole.path), learned(parts.path)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_an_unfinished_training_is_not_continued_with_other_settings(llava_folder, data, tmp_path):
    method, out = atp(llava_folder), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(llava_folder, data, out, method, SMALL, progress=Stopping(2))
    common = [llava_folder, "--method", "atp", "--set", LAYERS, "--set", "hidden_width=4", "--data", data]
    common += ["--target-tokens", "50%", "-o", out, "--batch-size", "4", "--device", "cpu"]
    refused = run_cli(*common, "--steps", "7")
    assert refused.exit_code == 1
    assert "another steps" in refused.stderr
    assert "--restart" in refused.stderr
    begun_anew = run_cli(*common, "--steps", "7", "--restart")
    assert begun_anew.exit_code == 0, begun_anew.output
    assert not (tmp_path / "out.training").exists()


def test_a_damaged_state_is_named_and_can_be_forgotten(llava_folder, data, tmp_path):
    state = tmp_path / "out.training"
    state.mkdir()
    (state / "state-2.safetensors").write_bytes(b"cut off")  # the first state was never finished
    first = fit(llava_folder, data, tmp_path / "out", atp(llava_folder), SMALL)
    with pytest.raises(KeyboardInterrupt):
        fit(llava_folder, data, tmp_path / "out", atp(llava_folder), SMALL, progress=Stopping(2))
    (state / "state-2.safetensors").write_bytes(b"cut off")
    with pytest.raises(DataError, match="damaged state: give --restart"):
        fit(llava_folder, data, tmp_path / "out", atp(llava_folder), SMALL)
    again = fit(llava_folder, data, tmp_path / "out", atp(llava_folder), SMALL, restart=True)
    assert again.curves == first.curves
    assert not state.exists()


def test_a_folder_that_is_no_state_is_left_alone(llava_folder, data, tmp_path):
    other = tmp_path / "out.training"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(DataError, match="is no unfinished training"):
            fit(llava_folder, data, tmp_path / "out", atp(llava_folder), SMALL, restart=restart)
    assert (other / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_two_processes_do_what_one_does(llava_folder, data, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'edgeprune[fit]'")
    one = fit(llava_folder, data, tmp_path / "one", atp(llava_folder), SMALL)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "edgeprune.cli", "fit", str(llava_folder), "--method", "atp"]
    launch += ["--set", LAYERS, "--set", "hidden_width=4", "--data", str(data), "--target-tokens", "50%"]
    launch += ["--steps", "6", "--batch-size", "4", "--device", "cpu", "-o", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("answers right as a whole") == 1
    curves = json.loads((tmp_path / "two" / "training.json").read_text())["curves"]
    for name, values in vars(one.curves).items():
        assert curves[name] == pytest.approx(values, abs=1e-4)
    expected, got = learned(one.path), learned(tmp_path / "two")
    assert all(torch.allclose(expected[key], got[key], atol=1e-5) for key in expected)


# --- data ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(llava_folder):
    return load_checkpoint(llava_folder, methods=(), dtype=torch.float32)


def training_data(model, folder, samples, **options):
    from edgeprune.calib.samples import choose_samples, read_samples

    data = TrainingData(model, InputSettings.from_checkpoint(folder, read_config(folder)), **options)
    data.add(choose_samples(read_samples(samples))[0], lambda _: None)
    return data


def test_a_batch_is_what_the_reference_runs_with_answers_behind(model, llava_folder, data):
    examples = training_data(model, llava_folder, data)
    batch = examples.batch([0, 1, 2])
    tokenizer = (
        InputSettings.from_checkpoint(llava_folder, read_config(llava_folder)).prompt_encoder().tokenizer
    )
    for row, example in enumerate(examples.examples[:3]):
        told = [token for token in batch.targets[row].tolist() if token >= 0]
        assert told == example.answer.tolist()
        name = ("red", "blue", "green")[row]
        assert tokenizer.decode(told, skip_special_tokens=True).strip() == f"It is {name}."
        assert told[-1] == 1  # the end token
        length = int(batch.length[row])
        assert length == len(example.prompt) + len(example.answer) - 1
        assert not batch.inputs_embeds[row, length:].any()
        assert int((batch.visual_slots[row] >= 0).sum()) == TINY.num_patches
    # The picture's rows are those of the tower, whichever batch they are in.
    again = examples.batch([2])
    rows = batch.visual_slots[2] >= 0
    assert torch.equal(batch.inputs_embeds[2][rows], again.inputs_embeds[0][again.visual_slots[0] >= 0])


def test_features_that_were_forgotten_are_computed_again(model, llava_folder, data):
    kept = training_data(model, llava_folder, data)
    forgetful = training_data(model, llava_folder, data, cache_bytes=0)
    for _ in range(2):
        assert torch.equal(kept.batch([0, 5]).inputs_embeds, forgetful.batch([0, 5]).inputs_embeds)


def test_every_example_comes_once_before_any_comes_again():
    split = Split.of(400, 3)
    assert sorted(split.train + split.held_out) == list(range(400))
    assert len(split.held_out) == 20
    stream = [index for step in range(76) for index in split.of_step(step, 10, 3)]
    assert sorted(stream[:380]) == sorted(stream[380:]) == sorted(split.train)
    assert stream[:380] != stream[380:]


def test_little_data_is_measured_on_itself():
    split = Split.of(30, 0)
    assert split.train == split.held_out


def test_samples_that_cannot_be_used_are_named_and_passed_over(llava_folder, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data.parent, folder)
    bad = [
        "{",
        '{"image": "red.png", "prompt": "What?"}',
        '{"audio": "a.wav", "prompt": "What?", "answer": "x"}',
    ]
    bad += ['{"image": "lost.png", "prompt": "What?", "answer": "x"}']
    (folder / "data.jsonl").write_text("\n".join([*bad, data.read_text()]))
    heard = Listening()
    result = fit(
        llava_folder, folder / "data.jsonl", tmp_path / "out", atp(llava_folder), SMALL, progress=heard
    )
    assert result.skipped == len(heard.skipped) == 4
    causes = ("no JSON", "picture", "no answer to learn from", "lost.png")
    for line, cause in zip(sorted(heard.skipped), ("line 1", "line 2", "line 3", "line 4"), strict=True):
        assert line.startswith(cause)
        assert any(cause in line for cause in causes)
    assert result.examples == 24


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ("", "holds no samples"),
        ("no json\n", "no JSON"),
        ('{"image": "red.png", "prompt": "What?"}\n' * 2, "no answer to learn from"),
        ('{"audio": "a.wav", "prompt": "What?", "answer": "x"}\n', '"audio" and no picture'),
        ('{"image": "lost.png", "prompt": "What?", "answer": "x"}\n', "lost.png"),
    ],
    ids=["empty", "no JSON", "no answers", "audio", "no picture"],
)
def test_useless_data_is_one_line(llava_folder, data, tmp_path, lines, cause):
    shutil.copytree(data.parent, tmp_path / "data")
    file = tmp_path / "data" / "data.jsonl"
    file.write_text(lines)
    refused(llava_folder, tmp_path, cause, data=file)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--target-tokens", "9.5"], "out of reach"),
        (["--target-tokens", "36"], "out of reach"),
        (["--target-tokens", "100%"], "out of range"),
        (["--target-tokens", "few"], "no number"),
        (["--method", "fastv"], "nothing to learn"),
        (["--method", "dyrate", "--set", "layer=3", "--target-tokens", "25%"], "out of reach"),
        (["--train", "target_tokens=3"], "--train takes"),
        (["--train", "learning_rate=high"], "takes a number"),
        (["--train", "learning_rate=-1"], "learning_rate"),
        (["--trainable", "tower"], "allowed: heads, all"),
        (["--precision", "int4"], "allowed: float32, bfloat16"),
        (["--steps", "0"], "steps is 0"),
        (["--device", "cuda:99"], "no device"),
        (["--set", "self_norm=none", "--set", "cross_norm=none"], "self_norm=minmax"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(llava_folder, data, tmp_path, options, cause):
    refused(llava_folder, tmp_path, cause, *options, data=data)


def refused(checkpoint, folder, cause, *options, data):
    before = sorted(folder.iterdir())
    method = [] if "--method" in options else ["--method", "atp", "--set", LAYERS]
    target = [] if "--target-tokens" in options else ["--target-tokens", "50%"]
    result = run_cli(
        checkpoint, *method, *target, "--data", data, "-o", folder / "out", "--steps", "2", *options
    )
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("edgeprune: ")]
    assert cause in line
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("data_is", ["missing", "folder"])
def test_data_that_is_no_file_is_one_line(llava_folder, data, tmp_path, data_is):
    path = data.parent if data_is == "folder" else tmp_path / "nothing.jsonl"
    refused(llava_folder, tmp_path, "no answers" if data_is == "folder" else "does not exist", data=path)


def test_other_folders_are_never_overwritten(llava_copy, data, tmp_path):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    before = hashes(llava_copy)
    for output, cause in (
        (llava_copy, "is the checkpoint itself"),
        (other, "no checkpoint that fit has written"),
    ):
        arguments = [
            "--method",
            "atp",
            "--set",
            LAYERS,
            "--target-tokens",
            "50%",
            "--data",
            data,
            "-o",
            output,
        ]
        result = run_cli(llava_copy, *arguments)
        assert result.exit_code == 1
        assert cause in result.stderr
    assert hashes(llava_copy) == before
    assert (other / "notes.txt").read_text() == "mine"


# --- other families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["atp", "dyrate"])
def test_every_family_is_fitted_and_prunes_as_was_measured(family_folder, many_sizes, tmp_path, name):
    setting = "layers=[1,2]" if name == "atp" else "layer=1"
    method = choose_method(family_folder, name, None, (setting,))
    options = dataclasses.replace(SMALL, steps=2)
    result = fit(family_folder, many_sizes, tmp_path / "out", method, options)
    assert result.skipped == 0
    assert 0.3 < result.tokens / result.unpruned_tokens < 0.75
    pruned = load_checkpoint(result.path, dtype=torch.float32)
    settings = InputSettings.from_checkpoint(result.path, read_config(result.path))
    encoder, num_layers = settings.prompt_encoder(), pruned.plan.geometry.num_layers
    layers = [0, *(planned.site.cut.layer for planned in pruned.plan.sites), num_layers]
    tokens = []
    for line in map(json.loads, many_sizes.read_text().splitlines()):
        names = line["image"] if isinstance(line["image"], list) else [line["image"]]
        prepared = settings.preprocessing.prepare(
            [Image.open(many_sizes.parent / each) for each in names], pruned.plan.geometry.grid
        )
        ids = encoder.encode_chat(line["prompt"], prepared.layout.tokens_per_image).token_ids
        kept = [len(prepared.layout.slots), *(site.kept for site in pruned.prefill(ids, prepared).sites)]
        tokens.append(np.dot(np.diff(layers), kept) / num_layers)
    if name == "atp":
        assert np.mean(tokens) == pytest.approx(result.tokens, abs=1e-3)
    else:
        # What was measured counts the answers' tokens, too, at which more may be dropped.
        assert result.tokens <= np.mean(tokens) + 1e-3


@pytest.mark.parametrize("trainable", ["heads", "all"])
def test_llavas_own_layout_without_its_tower(data, tmp_path, trainable):
    both = build_both(tmp_path)
    options = dataclasses.replace(SMALL, steps=2, trainable=trainable, decoder_learning_rate=1e-3)
    out = tmp_path / "out"
    method = atp(both.outside, "layers=[1,2]")
    result = fit(both.outside, data, out, method, options, clip=both.clip)
    assert result.skipped == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (both.outside, out))
    assert old.keys() == new.keys()
    assert not any("vision_tower" in name for name in new)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert bool(changed) == (trainable == "all")
    assert not any("mm_projector" in name for name in changed)
    assert load_checkpoint(out, clip=both.clip).plan.methods == (result.method,)
