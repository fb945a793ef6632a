"""TensorRT's plugins, compiled with TensorRT's headers over the C++ references: everything but the launches."""

import ctypes
import inspect
import platform

import numpy as np
import pytest
import torch
from kernel_inputs import (
    DTYPES,
    AttentionCase,
    DppCase,
    SoftNmsCase,
    attention_in_float64,
    dpp_in_float64,
    random_droppable,
    random_scores,
)

from edgeprune.export.operators import attention_score as attention_score_function
from edgeprune.export.operators import token_gather as token_gather_function
from edgeprune.export.operators import token_select as token_select_function
from edgeprune.export.operators.function_body import PLUGIN_ATTRIBUTES
from edgeprune.operators.schema import (
    ATTENTION_SCORE,
    DPP,
    PLUGIN_LIBRARY_VERSION,
    PLUGIN_MODES,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    SCORE_SELECT,
    SOFT_NMS,
    THRESHOLD,
    TOKEN_GATHER,
    TOKEN_SELECT,
    TOPK,
)
from edgeprune.operators.token_gather import token_gather
from edgeprune.operators.token_select import (
    select_by_dpp,
    select_by_soft_nms,
    select_by_threshold,
    select_top_k,
)
from edgeprune.plugins.plugin_library import PluginLibrary

# One worker builds the libraries and runs all tests of them.
pytestmark = pytest.mark.xdist_group("plugins")

# What a plugin is by the time that it runs: as the parser made it, a copy, a context's copy, one out of an engine.
LIVES = {
    "created": lambda plugin: plugin,
    "cloned": lambda plugin: plugin.clone(),
    "attached": lambda plugin: plugin.clone().attached(),
    "from an engine": lambda plugin: plugin.through_engine().clone(),
}


def test_creators_are_what_the_nodes_ask_for(plugin_host):
    functions = {
        ATTENTION_SCORE: [
            attention_score_function.function(mode, True) for mode in PLUGIN_MODES[ATTENTION_SCORE]
        ],
        TOKEN_SELECT: [token_select_function.function(mode) for mode in PLUGIN_MODES[TOKEN_SELECT]],
        TOKEN_GATHER: [token_gather_function.function(1, 0)],
    }
    creators = plugin_host.creators()
    # ScoreSelect is no operator of a bundle; its attributes are those of its parts.
    version, namespace, kind, attributes = creators.pop(SCORE_SELECT)
    assert (version, namespace, kind) == (PLUGIN_VERSION, PLUGIN_NAMESPACE, "PLUGIN CREATOR_V3ONE")
    assert attributes == {"scale", "causal", "score_mode", "mode", "similarity_sigma"}
    assert set(creators) == set(PLUGIN_MODES) == set(functions)
    for name, (version, namespace, kind, attributes) in creators.items():
        assert (version, namespace, kind) == (PLUGIN_VERSION, PLUGIN_NAMESPACE, "PLUGIN CREATOR_V3ONE")
        declared = {attribute for function in functions[name] for attribute in function.attributes}
        assert attributes == declared - set(PLUGIN_ATTRIBUTES)


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(B=2, H=4, Hkv=2, Q=3, R=3, S=20, D=16, G=2, per_batch=True),
        AttentionCase(H=4, Hkv=4, Q=12, R=12, S=12, D=8, causal=False),
        AttentionCase(H=2, Hkv=1, Q=5, R=5, S=9, D=8, G=3, mode="logits"),
    ],
    ids=["causal", "not causal", "logits"],
)
def test_attention_score(plugin_host, case, dtype, life):
    case = AttentionCase(**{**vars(case), "dtype": dtype})
    inputs = case.inputs(3)
    attributes = {"scale": case.scale, "mode": case.mode, "causal": int(case.causal)}
    plugin = LIVES[life](plugin_host.create(ATTENTION_SCORE, attributes))
    (score,) = plugin(*(inputs[name] for name in ("query", "key", "row_index", "row_weight")))
    assert (score.shape, score.dtype) == ((case.B, case.G, case.S), torch.float32)
    np.testing.assert_allclose(score.numpy(), attention_in_float64(case, inputs), rtol=1e-4, atol=1e-5)
    assert f"mode={case.mode}" in plugin.metadata


@pytest.mark.parametrize("life", LIVES)
def test_token_select(plugin_host, life):
    rng = np.random.default_rng(5)
    threshold, topk = (
        LIVES[life](plugin_host.create(TOKEN_SELECT, {"mode": mode})) for mode in (THRESHOLD, TOPK)
    )
    for S in (1, 7, 70):
        for _ in range(5):
            scores, thresholds, droppable = (
                random_scores(rng, 2, S),
                random_scores(rng, 2, S),
                random_droppable(rng, S),
            )
            assert_same(
                threshold(scores, thresholds, droppable), select_by_threshold(scores, thresholds, droppable)
            )
            num_keep = torch.tensor(int(rng.integers(-1, S + 2)))
            assert_same(topk(scores[:1], num_keep, droppable), select_top_k(scores[:1], num_keep, droppable))


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_token_select_by_soft_nms(plugin_host, dtype, life):
    case = SoftNmsCase(keep=(11,), dtype=dtype)
    inputs = case.inputs(1)
    single = {name: tensor if name == "nearness" else tensor[0] for name, tensor in inputs.items()}
    single["scores"] = inputs["scores"]
    plugin = LIVES[life](plugin_host.create(TOKEN_SELECT, {"mode": SOFT_NMS, "similarity_sigma": case.sigma}))
    order = [name for name in inspect.signature(select_by_soft_nms).parameters if name in single]
    chosen = plugin(*(single[name].contiguous() for name in order))
    single["features"] = single["features"].float()
    assert_same(chosen, select_by_soft_nms(**single, similarity_sigma=case.sigma))


@pytest.mark.parametrize("life", LIVES)
def test_token_select_by_dpp(plugin_host, life):
    plugin = LIVES[life](plugin_host.create(TOKEN_SELECT, {"mode": DPP}))
    for seed in range(4):
        inputs = DppCase(keep=(3 * seed,)).inputs(seed)
        assert dpp_in_float64(inputs, 0)[1] > 1
        single = [tensor[0].contiguous() for tensor in inputs.values()]
        assert_same(plugin(*single), select_by_dpp(*single))


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("K", [0, 1, 5, 9])
def test_token_gather(plugin_host, life, K):
    rng = np.random.default_rng(K)
    shapes = {torch.float16: (1, 9, 6), torch.int64: (9,), torch.bfloat16: (2, 3, 9, 4), torch.int32: (1, 9)}
    axes = [1, 0, 2, 1]
    tensors = [torch.from_numpy(rng.integers(-9, 9, shape)).to(dtype) for dtype, shape in shapes.items()]
    keep = torch.from_numpy(rng.choice(9, K, replace=False))
    plugin = LIVES[life](plugin_host.create(TOKEN_GATHER, {"axes": axes}))
    assert_same(plugin(keep, *tensors), token_gather(keep, tensors, axes))


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("mode", [TOPK, SOFT_NMS])
def test_score_select_is_the_selection_of_the_score(plugin_host, mode, dtype, life):
    select = SoftNmsCase(keep=(11,), dtype=dtype).inputs(3)
    S = select["scores"].shape[1]
    case = AttentionCase(H=4, Hkv=2, Q=3, R=3, S=S, D=16, dtype=dtype)
    attention = case.inputs(3)
    score = plugin_host.create(
        ATTENTION_SCORE, {"scale": case.scale, "mode": case.mode, "causal": int(case.causal)}
    )
    selection = {"mode": mode, "similarity_sigma": 0.5}
    attributes = {"scale": case.scale, "score_mode": case.mode, "causal": int(case.causal), **selection}
    before = [attention[name] for name in ("query", "key", "row_index", "row_weight")]
    behind = [select[name][0].contiguous() for name in ("num_keep", "droppable", "features", "places")]
    behind = [*behind, select["nearness"]][: 2 if mode == TOPK else 5]
    plugin = LIVES[life](plugin_host.create(SCORE_SELECT, attributes))
    chosen = plugin(*before, *behind)
    (scores,) = score(*before)
    selected = plugin_host.create(TOKEN_SELECT, selection)(scores[:, 0].contiguous(), *behind)
    assert_same(chosen, selected)
    assert 11 < int(chosen[1]) < S


def test_score_select_takes_one_score_of_one_sequence(plugin_host):
    attributes = {"scale": 1.0, "score_mode": "logits", "causal": 0, "mode": TOPK}
    plugin = plugin_host.create(SCORE_SELECT, attributes)
    for B, G in ((2, 1), (1, 2)):
        query, weight = torch.zeros(B, 1, 3, 8), torch.zeros(G, 3)
        inputs = [query, query, torch.arange(3), weight, torch.tensor(1), torch.ones(3, dtype=torch.bool)]
        outputs = plugin.infer(inputs)
        assert not plugin.run(inputs, outputs)
        assert "edgeprune.ScoreSelect: its kernels returned CUDA error 1" in plugin_host.log()
    assert plugin_host.create(SCORE_SELECT, {**attributes, "mode": THRESHOLD}) is None
    assert "mode 'threshold' does not choose by one score" in plugin_host.log()


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        (TOKEN_SELECT, {"mode": "best"}, "no kernel for mode 'best': build this graph without the plugin"),
        (TOKEN_SELECT, {}, "the attribute 'mode' is missing"),
        (TOKEN_SELECT, {"mode": 3}, "the attribute 'mode' is no text"),
        (TOKEN_SELECT, {"mode": SOFT_NMS}, "the attribute 'similarity_sigma' is missing"),
        (ATTENTION_SCORE, {"mode": "logits", "causal": 1, "scale": 1}, "the attribute 'scale' is no number"),
        (ATTENTION_SCORE, {"mode": "both", "causal": 1, "scale": 1.0}, "no kernel for mode 'both'"),
        (TOKEN_GATHER, {"axes": list(range(9))}, "one axis for each of 1 to 8 tensors"),
        (TOKEN_GATHER, {"axes": [-1]}, "one axis for each of 1 to 8 tensors"),
        (TOKEN_GATHER, {"axes": "none"}, "the attribute 'axes' is no whole number"),
    ],
)
def test_attributes_that_no_kernel_has_are_named_in_the_log(plugin_host, name, attributes, message):
    assert plugin_host.create(name, attributes) is None
    (line,) = plugin_host.log().splitlines()
    assert line.startswith(f"edgeprune.{name}: node 'node': ")
    assert message in line


def test_types_and_layouts_that_are_not_taken_are_refused(plugin_host):
    gather = plugin_host.create(TOKEN_GATHER, {"axes": [0]})
    keep, data, flags = torch.zeros(2, dtype=torch.int64), torch.zeros(5), torch.zeros(5, dtype=torch.bool)
    tensors = [keep, data, data[:2]]
    assert all(gather.supports(position, tensors, 1) for position in range(3))
    assert not gather.supports(1, tensors, 1, linear=False)
    assert not gather.supports(0, [keep.int(), data, data], 1)
    assert not gather.supports(1, [keep, flags, flags], 1)  # TensorRT lets no plugin put booleans out
    assert not gather.supports(2, [keep, data, data.half()], 1)
    assert not gather.supports(0, [keep, data, data, data], 1)
    assert gather.infer([keep, flags]) is None
    assert "input 1 has a type that it does not take" in plugin_host.log()
    assert gather.infer([keep[None], data]) is None
    assert "input 0 has 2 dimensions" in plugin_host.log()
    assert gather.infer([keep, data, data]) is None
    assert "another number of inputs" in plugin_host.log()

    query = torch.zeros(1, 2, 3, 8)
    index, weight = torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3)
    score = plugin_host.create(ATTENTION_SCORE, {"scale": 1.0, "mode": "logits", "causal": 0})
    assert score.supports(1, [query, query, index, weight, weight], 1)
    assert not score.supports(1, [query, query.half(), index, weight, weight], 1)
    assert not score.supports(3, [query, query, index, weight.half(), weight], 1)


def test_sizes_that_do_not_fit_are_an_error_and_no_result(plugin_host):
    topk = plugin_host.create(TOKEN_SELECT, {"mode": TOPK})
    inputs = [torch.zeros(1, 5), torch.tensor(2), torch.ones(6, dtype=torch.bool)]
    outputs = topk.infer(inputs)
    assert not topk.run(inputs, outputs)
    assert plugin_host.log() == (
        "edgeprune.TokenSelect: its kernels returned CUDA error 1: the sizes are not valid or too large\n"
    )
    assert all((tensor == 77).all() for tensor in outputs)


def test_profiles_beyond_the_kernels_limits_are_refused_when_building(plugin_host):
    topk = plugin_host.create(TOKEN_SELECT, {"mode": TOPK})
    for S, fits in ((16384, True), (16385, False)):
        inputs = [torch.zeros(1, S), torch.tensor(2), torch.ones(S, dtype=torch.bool)]
        assert topk.configure(inputs, topk.infer(inputs)) == fits
    assert "the profile has 16385 rows, its kernels take 16384" in plugin_host.log()
    score = plugin_host.create(ATTENTION_SCORE, {"scale": 1.0, "mode": "logits", "causal": 0})
    for D, fits in ((256, True), (257, False)):
        query = torch.zeros(1, 1, 2, D)
        inputs = [query, query, torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2)]
        assert score.configure(inputs, score.infer(inputs)) == fits
    assert "heads are 257 wide, its kernels take 256" in plugin_host.log()


def test_the_library_says_what_it_is(reference_plugins):
    library = PluginLibrary.open(reference_plugins)
    assert (library.version, library.machine) == (PLUGIN_LIBRARY_VERSION, platform.machine())
    assert library.architectures == (89,)
    ask = ctypes.CDLL(str(reference_plugins)).edgeprune_plugin_built_for
    ask.restype = ctypes.c_char_p
    major, minor = library.tensorrt
    assert (
        ask()
        .decode()
        .startswith(f"edgeprune plugin {library.version}; TensorRT {major}.{minor}; CUDA {library.cuda}")
    )
