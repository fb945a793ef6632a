import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    TinyLlava,
    add_atp,
    build_clip,
    build_llava,
    edit_json,
    edit_weights,
    random_prompt,
    write_pruning,
)

from edgeprune.checkpoint import load_checkpoint, read_methods
from edgeprune.checkpoint_weights import open_weights, release_pages, weight_files
from edgeprune.errors import CheckpointError, EdgepruneError, PruningError
from edgeprune.prune.atp import Atp
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.random_tokens import RandomTokens


def refusal(kind: type[EdgepruneError], folder: Path, **options) -> str:
    """The one line that a checkpoint is refused with."""
    with pytest.raises(kind) as error:
        load_checkpoint(folder, **options)
    assert type(error.value) is kind
    message = str(error.value)
    assert "\n" not in message
    return message


# --- the folder --------------------------------------------------------------------------------------------


def test_not_a_folder(tmp_path):
    message = refusal(CheckpointError, tmp_path / "nowhere")
    assert message == f"{tmp_path / 'nowhere'} is not a folder: give the folder of a Hugging Face checkpoint"


def test_no_config(tmp_path):
    assert "has no config.json: is it a Hugging Face checkpoint?" in refusal(CheckpointError, tmp_path)


@pytest.mark.parametrize(
    ("text", "cause"),
    [("{", "is not readable JSON"), ("[1]", "is not a JSON object"), ("", "is not readable JSON")],
)
def test_malformed_config(llava_copy, text, cause):
    (llava_copy / "config.json").write_text(text)
    message = refusal(CheckpointError, llava_copy)
    assert f"config.json {cause}" in message
    assert message.endswith("copy the file again")


@pytest.mark.parametrize("family", ["llama", None, ["llava"]])
def test_unknown_family(llava_copy, family):
    edit_json(llava_copy / "config.json", model_type=family)
    assert f"the family '{family}' is unknown, known: llava" in refusal(CheckpointError, llava_copy)


# --- the weights -------------------------------------------------------------------------------------------


def test_no_weights(llava_copy):
    (llava_copy / "model.safetensors").unlink()
    assert "holds no model.safetensors: is it a Hugging Face checkpoint?" in refusal(
        CheckpointError, llava_copy
    )
    (llava_copy / "pytorch_model.bin").write_bytes(b"")
    assert "holds .bin weights: save it again with safe_serialization=True" in refusal(
        CheckpointError, llava_copy
    )


def test_missing_shards_are_listed(tmp_path):
    build_llava(tmp_path, TinyLlava(max_shard_size="50KB"))
    shards = weight_files(tmp_path)
    for shard in shards[1:3]:
        shard.unlink()
    message = refusal(CheckpointError, tmp_path)
    assert f"2 of {len(shards)} shards are missing" in message
    assert f"{shards[1].name}; {shards[2].name}; copy them there" in message


@pytest.mark.parametrize("weight_map", [..., ["a"], {"lm_head.weight": 3}])
def test_malformed_index(llava_copy, weight_map):
    (llava_copy / "model.safetensors.index.json").write_text("{}")
    edit_json(llava_copy / "model.safetensors.index.json", weight_map=weight_map)
    assert "has no usable 'weight_map': copy the file again" in refusal(CheckpointError, llava_copy)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_weights(llava_copy, size):
    path = llava_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(CheckpointError, llava_copy)
    assert message.startswith(f"{path} is truncated or damaged (")
    assert message.endswith("copy the file again")


def test_config_of_another_checkpoint(llava_copy):
    text = json.loads((llava_copy / "config.json").read_text())["text_config"]
    edit_json(
        llava_copy / "config.json", text_config=text | {"intermediate_size": 40, "num_hidden_layers": 5}
    )
    message = refusal(CheckpointError, llava_copy)
    # All at once, but no wall of text: 12 MLP matrices and the 9 tensors of the fifth layer.
    assert "language_model.layers.0.mlp.gate_proj.weight is [48, 32], expected [40, 32]" in message
    assert "; and 9 more; the config.json belongs to another checkpoint or weights are lost" in message


def test_several_lost_weights(llava_copy):
    path = llava_copy / "model.safetensors"
    data = load_file(path)
    lost = [name for name in data if name.endswith(("linear_1.bias", "class_embedding"))]
    data |= {name: tensor.long() for name, tensor in data.items() if name.endswith("linear_2.bias")}
    save_file({name: tensor for name, tensor in data.items() if name not in lost}, path)
    message = refusal(CheckpointError, llava_copy)
    assert "multi_modal_projector.linear_1.bias is missing" in message
    assert "vision_tower.embeddings.class_embedding is missing" in message
    assert "multi_modal_projector.linear_2.bias is int64, expected a float type" in message


def mapped_spans(file: Path) -> list[tuple[int, int]]:
    """The address ranges of this process that are pages of a file."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, end = line.split()[0].split("-")
            spans.append((int(start, 16), int(end, 16)))
    return spans


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_weights_stay_memory_mapped_unless_converted(llava_folder, dtype):
    model = load_checkpoint(llava_folder, dtype=dtype).model
    spans = mapped_spans(llava_folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (dtype or torch.float32)
        mapped = any(start <= tensor.data_ptr() < end for start, end in spans)
        assert mapped == (dtype != torch.float16), name


def resident_bytes(file: Path) -> int:
    """How much of a mapped file is in the memory of this process."""
    entries = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    mine = [entry for entry in entries if entry.split("\n", 1)[0].endswith(str(file))]
    return sum(1024 * int(re.search(r"^Rss: +(\d+) kB", entry, re.M)[1]) for entry in mine)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_released_pages_are_read_again(tmp_path):
    tensors = {"a": torch.arange(2**20, dtype=torch.float32), "b": torch.ones(2**18)}
    save_file(tensors, tmp_path / "model.safetensors")
    mapped = open_weights([tmp_path / "model.safetensors"])
    in_no_file = torch.arange(2**18)
    for _ in range(2):
        assert all(torch.equal(mapped[name], tensor) for name, tensor in tensors.items())
        assert resident_bytes(tmp_path / "model.safetensors") > 4 * 2**20
        release_pages([*mapped.values(), mapped["a"][5:9], in_no_file])
        assert resident_bytes(tmp_path / "model.safetensors") < 2**16
    assert torch.equal(in_no_file, torch.arange(2**18))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_tied_weights_are_one_tensor(tmp_path, dtype):
    build_llava(tmp_path, TinyLlava(tied=True))
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    model = load_checkpoint(tmp_path, dtype=dtype).model
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


def test_nothing_is_trainable(atp_folder):
    model = load_checkpoint(atp_folder)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not model.prefill(*random_prompt()).logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs(atp_folder, dtype):
    exact, half = load_checkpoint(atp_folder), load_checkpoint(atp_folder, dtype=dtype)
    assert half.dtype == dtype
    state = half.prefill(*random_prompt())
    assert state.logits.dtype == dtype
    assert all(key.dtype == value.dtype == dtype for key, value in state.caches.values())
    # Without pruning, so that a token on the edge of its threshold cannot change the picture.
    expected = load_checkpoint(atp_folder, methods=[]).prefill(*random_prompt()).logits
    rounded = load_checkpoint(atp_folder, methods=[], dtype=dtype).prefill(*random_prompt()).logits.float()
    assert (rounded - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.2) * expected.abs().max()
    assert exact.plan == half.plan


# --- pruning.json ------------------------------------------------------------------------------------------


def test_methods_are_read(llava_copy):
    assert read_methods(llava_copy) == ()
    write_pruning(llava_copy, [{"method": "random", "parameters": {"keep": 5}}, {"method": "ivtp"}])
    assert read_methods(llava_copy) == (RandomTokens(keep=5), Ivtp())
    assert load_checkpoint(llava_copy, methods=[]).plan.methods == ()


@pytest.mark.parametrize(
    ("text", "kind", "cause"),
    [
        ('{"methods": [', CheckpointError, "is not readable JSON"),
        ("[]", CheckpointError, "is not a JSON object"),
        ("{}", PruningError, "'methods' is not a list of {method, parameters} objects"),
        ('{"methods": {"method": "atp"}}', PruningError, "'methods' is not a list"),
        ('{"methods": ["atp"]}', PruningError, "'methods' is not a list"),
        (
            '{"methods": [{"method": "atq"}]}',
            PruningError,
            "unknown pruning method 'atq', known: adaptprune, atp, ",
        ),
        ('{"methods": [{"parameters": {}}]}', PruningError, "unknown pruning method 'None'"),
        ('{"methods": [{"method": "atp", "parameters": [4]}]}', PruningError, "'parameters' of 'atp' is [4]"),
        ('{"methods": [{"method": "atp", "parameters": {"layers": [9]}}]}', PruningError, "layers 1 … 3"),
        ('{"methods": [{"method": "atp", "parameters": {"layer": [2]}}]}', PruningError, "parameter 'layer'"),
        ('{"methods": [{"method": "random", "parameters": {"keep": 99}}]}', PruningError, "a picture has 36"),
    ],
)
def test_malformed_pruning(llava_copy, text, kind, cause):
    (llava_copy / "pruning.json").write_text(text)
    assert cause in refusal(kind, llava_copy)


# --- pruning.safetensors -----------------------------------------------------------------------------------


def test_missing_pruning_weights(llava_copy):
    write_pruning(llava_copy, [{"method": "atp", "parameters": {"layers": [2]}}])
    message = refusal(PruningError, llava_copy)
    assert "atp has learned weights, and" in message
    assert "pruning.safetensors does not exist: train them first, or choose ivtp or random" in message


def test_every_misfit_of_the_pruning_weights_is_listed_at_once(llava_copy):
    add_atp(llava_copy, [1, 3])
    edit_weights(
        llava_copy / "pruning.safetensors",
        atp__site0__proj__weight=torch.zeros(8, 70),
        atp__site0__head_r__bias=...,
        atp__site1__head_s__weight=torch.zeros(1, 9),
        atp__site1__proj__bias=torch.zeros(8, dtype=torch.int64),
    )
    message = refusal(PruningError, llava_copy)
    for problem in (
        "pruning.safetensors does not fit: ",
        "atp.site0.proj.weight is [8, 70], expected [8, 72]",
        "atp.site0.head_r.bias is missing",
        "atp.site1.head_s.weight is [1, 9], expected [1, 8]",
        "atp.site1.proj.bias is int64, expected a float type",
        "; train the heads for this model and these parameters",
    ):
        assert problem in message


def test_truncated_pruning_weights(llava_copy):
    add_atp(llava_copy, [1])
    path = llava_copy / "pruning.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert f"{path} is truncated or damaged" in refusal(PruningError, llava_copy)


def test_pruning_weights_of_any_float_type(atp_folder, llava_copy):
    add_atp(llava_copy, [1, 2, 3])
    data = load_file(llava_copy / "pruning.safetensors")
    save_file({name: tensor.half() for name, tensor in data.items()}, llava_copy / "pruning.safetensors")
    weights = load_checkpoint(llava_copy).weights
    expected = load_checkpoint(atp_folder).weights
    assert set(weights) == set(expected) == set(data)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(torch.equal(weights[name], tensor.half().float()) for name, tensor in expected.items())


def test_site_out_of_range(atp_folder):
    message = refusal(PruningError, atp_folder, methods=[Atp(layers=(1, 4), hidden_width=8)])
    assert message == "atp: a site before layer 4 is out of range: this decoder allows layers 1 … 3"


# --- CLIP --------------------------------------------------------------------------------------------------

IVTP = Ivtp(20, 10, decoder_layers=3)


def test_ivtp_without_clip(llava_folder):
    message = refusal(PruningError, llava_folder, methods=[IVTP])
    assert "give its folder with --clip PATH" in message
    assert "text_selection=all" in message
    assert load_checkpoint(llava_folder, methods=[Ivtp(20, 10, 3, text_selection="all")]).clip is None


def test_clip_of_another_tower(llava_folder, tmp_path):
    other = TinyLlava(seed=9)
    clip = build_clip(tmp_path / "clip", build_llava(tmp_path / "llava", other), other)
    message = refusal(CheckpointError, llava_folder, methods=[IVTP], clip=clip)
    assert "is not the one of this LLaVA checkpoint" in message
    assert message.endswith("differs): give the CLIP it was made from")


def test_clip_that_is_none(llava_folder, tmp_path):
    assert "--clip takes the folder of a CLIP checkpoint" in refusal(
        CheckpointError, llava_folder, methods=[IVTP], clip=tmp_path
    )
    assert "is no CLIP checkpoint: its config.json is of 'llava'" in refusal(
        CheckpointError, llava_folder, methods=[IVTP], clip=llava_folder
    )


def test_clip_without_its_text_tower(llava_folder, clip_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    data = load_file(tmp_path / "model.safetensors")
    vision = {name: tensor for name, tensor in data.items() if not name.startswith("text_")}
    save_file(vision, tmp_path / "model.safetensors")
    message = refusal(CheckpointError, llava_folder, methods=[IVTP], clip=tmp_path)
    assert f"the text tower in {tmp_path} does not fit" in message
    assert "text_tower.embeddings.token_embedding.weight is missing" in message
    save_file(data | {"visual_projection.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    message = refusal(CheckpointError, llava_folder, methods=[IVTP], clip=tmp_path)
    assert "weight is [3, 3], expected [12, 24]" in message


def test_clip_takes_the_type_of_the_model(llava_folder, clip_folder):
    model = load_checkpoint(llava_folder, methods=[IVTP], clip=clip_folder, dtype=torch.float16)
    assert {weight.dtype for weight in model.clip.guide.parameters()} == {torch.float16}
    assert model.clip.visual_projection.weight.dtype == torch.float16
