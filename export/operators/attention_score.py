"""AttentionScore as an ONNX node and as a function of standard operators.

Torch reference: ``edgeprune.operators.attention_score``. Keys of grouped-query attention are never repeated:
the query heads that share a key head are stacked as further rows of one product.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeprune.export.operators.function_body import FunctionBody
from edgeprune.export.operators.operator_node import emit
from edgeprune.operators.schema import ATTENTION_SCORE, ATTENTION_SCORE_MODES, LOGITS

_ATTRIBUTES = {
    "scale": ir.AttributeType.FLOAT,
    "mode": ir.AttributeType.STRING,
    "causal": ir.AttributeType.INT,
}


def translation(
    query: Any,
    key: Any,
    row_index: Any,
    row_weight: Any,
    scale: float,
    mode: str,
    causal: bool,
) -> Any:
    """The node of one ``edgeprune::attention_score`` call, for ``custom_translation_table``."""
    (score,) = emit(
        ATTENTION_SCORE,
        {"query": query, "key": key, "row_index": row_index, "row_weight": row_weight},
        ["score"],
        {"scale": scale, "mode": mode, "causal": int(causal)},
    )
    return score


def specialisation(node: ir.Node) -> tuple[str, bool]:
    """The mode and causality of a node, which its function body is written for."""
    return node.attributes["mode"].as_string(), bool(node.attributes["causal"].as_int())


def precedence(mode: str, causal: bool) -> tuple[int, ...]:
    """Softmax first: its kernel saves most. The product of logits needs no plugin."""
    return ATTENTION_SCORE_MODES.index(mode), not causal


def function(mode: str, causal: bool, *, opset_version: int = 23) -> ir.Function:
    """The function body for one mode; ``scale`` stays an attribute of the calling node.

    Shapes:
        query: [B, H, R, D], key: [B, Hkv, S, D] float32, float16 or bfloat16
        row_index: [R] int64, row_weight: [G, R] or [B, G, R] float32
        score: [B, G, S] float32
    """
    body = FunctionBody(
        ATTENTION_SCORE, ["query", "key", "row_index", "row_weight"], opset_version=opset_version
    )
    score = _logits(body) if mode == LOGITS else _probabilities(body, causal)
    return body.function({"score": score}, _ATTRIBUTES)


def _probabilities(body: FunctionBody, causal: bool) -> ir.Value:
    query, key = body.input("query"), body.input("key")
    scale = body.attribute("scale", name="scale")
    scaled = body.op("Mul", _float32(body, query, "query_f32"), scale, name="query_scaled")
    rows = body.op("Reshape", scaled, _stacked_shape(body), name="rows")  # [B, Hkv, H/Hkv·R, D]
    products = body.op("MatMul", rows, _key_transposed(body), name="products")
    last = body.constant([-1], name="last")
    leading = body.op("Shape", query, name="query_shape", end=3)
    logits_shape = body.op("Concat", leading, last, name="logits_shape", axis=0)
    logits = body.op("Reshape", products, logits_shape, name="logits")  # [B, H, R, S]
    if causal:
        logits = body.op("Add", logits, _causal_bias(body), name="logits_causal")
    probabilities = body.op("Softmax", logits, name="probabilities", axis=-1)

    # Heads and rows are summed in one product, [B, G, H·R] × [B, H·R, S]: the probabilities are read once.
    batch = body.op("Shape", key, name="batch", end=1)
    keys = body.op("Shape", key, name="num_keys", start=2, end=3)
    flat_shape = body.op("Concat", batch, last, keys, name="flat_shape", axis=0)
    flat = body.op("Reshape", probabilities, flat_shape, name="probabilities_flat")
    weight = _tiled_weight(body, body.input("row_weight"), _dim(body, query, 1, "num_heads"), [-1])
    return body.op("MatMul", weight, flat, name="score")


def _logits(body: FunctionBody) -> ir.Value:
    # The rows and the heads of one key head are weighted before the product: no row has logits of its own.
    query, key = body.input("query"), body.input("key")
    stacked = _stacked_shape(body)
    rows = body.op("Reshape", _float32(body, query, "query_f32"), stacked, name="rows")
    num_heads = _dim(body, query, 1, "num_heads")
    group = body.op("Div", num_heads, _dim(body, key, 1, "num_key_heads"), name="heads_per_key_head")
    scaled = body.op(
        "Mul", body.input("row_weight"), body.attribute("scale", name="scale"), name="weight_scaled"
    )
    weight = _tiled_weight(body, scaled, group, [-1, 1])
    weighted = body.op("MatMul", weight, rows, name="rows_weighted")  # [B, Hkv, G, D]
    products = body.op("MatMul", weighted, _key_transposed(body), name="products")  # [B, Hkv, G, S]
    head_axis = body.constant([1], name="head_axis")
    return body.op("ReduceSum", products, head_axis, name="score", keepdims=0)


def _float32(body: FunctionBody, value: ir.Value, name: str) -> ir.Value:
    return body.op("Cast", value, name=name, to=ir.DataType.FLOAT.value)


def _dim(body: FunctionBody, value: ir.Value, axis: int, name: str) -> ir.Value:
    return body.op("Shape", value, name=name, start=axis, end=axis + 1)


def _key_transposed(body: FunctionBody) -> ir.Value:
    key = _float32(body, body.input("key"), "key_f32")
    return body.op("Transpose", key, name="key_transposed", perm=[0, 1, 3, 2])


def _stacked_shape(body: FunctionBody) -> ir.Value:
    """[B, Hkv, -1, D]: of the queries with the heads of one key head as further rows."""
    key = body.input("key")
    leading = body.op("Shape", key, name="key_leading", end=2)
    rest = body.constant([-1], name="all_rows")
    return body.op("Concat", leading, rest, _dim(body, key, 3, "head_size"), name="stacked_shape", axis=0)


def _tiled_weight(body: FunctionBody, weight: ir.Value, repeats: ir.Value, leading: list[int]) -> ir.Value:
    """The weights of the rows of each stacked head, over the number of heads: [*leading, G, repeats·R].

    ``leading`` gives both forms of row_weight the same rank: -1 stands for 1 or B.
    """
    heads = _float32(body, _dim(body, body.input("query"), 1, "head_count"), "head_count_f32")
    mean = body.op("Div", weight, heads, name="weight_mean")
    rows = body.op("Shape", weight, name="weight_rows", start=-2)
    shape = body.op("Concat", body.constant(leading, name="leading"), rows, name="weight_shape", axis=0)
    mean = body.op("Reshape", mean, shape, name="weight_batched")
    ones = body.constant([1] * (len(leading) + 1), name="ones")
    return body.op("Tile", mean, body.op("Concat", ones, repeats, name="repeats", axis=0), name="weight")


def _causal_bias(body: FunctionBody) -> ir.Value:
    """[R, S]: 0 for the keys up to a row's own index, -inf behind it."""
    zero, one = body.constant(0, name="start"), body.constant(1, name="step")
    end = body.op("Squeeze", _dim(body, body.input("key"), 2, "key_length"), name="end")
    positions = body.op("Range", zero, end, one, name="positions")
    row_axis = body.constant([1], name="row_axis")
    limit = body.op("Unsqueeze", body.input("row_index"), row_axis, name="limit")
    hidden = body.op("Greater", positions, limit, name="hidden")
    excluded, included = body.constant(-np.inf, name="excluded"), body.constant(0.0, name="included")
    return body.op("Where", hidden, excluded, included, name="causal_bias")
