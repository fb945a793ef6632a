"""TokenSelect as an ONNX node and as functions of standard operators, one per mode.

Torch references: ``edgeprune.operators.token_select``. No size depends on the data: the permutation is built
from a cumulative sum and one scatter. Ties are broken by cumulative sums too, not by TopK, whose order among
equals runtimes need not keep.

Modes ``soft_nms`` and ``dpp`` are Loops, because each choice needs the one before it and their number grows with the
number of pictures; unrolled, it would be fixed at export. The body lies in a site's graph, which runs once per prompt,
and a runtime with the plugin does not run it.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeprune.export.operators.function_body import FunctionBody
from edgeprune.export.operators.operator_node import emit
from edgeprune.operators.schema import (
    DPP,
    DPP_EPSILON,
    DPP_STEPS,
    SOFT_NMS,
    THRESHOLD,
    TOKEN_SELECT,
    TOKEN_SELECT_MODES,
    TOPK,
)

_OUTPUTS = ["keep_indices", "keep_count"]
# Above every row's position, so that a position plus a tier still sorts by tier first.
_TIER = 2**40


def translate_threshold(scores: Any, thresholds: Any, droppable: Any) -> tuple[Any, ...]:
    """The node of one ``edgeprune::token_select_threshold`` call, for ``custom_translation_table``."""
    inputs = {"scores": scores, "thresholds": thresholds, "droppable": droppable}
    return tuple(emit(TOKEN_SELECT, inputs, _OUTPUTS, {"mode": THRESHOLD}))


def translate_topk(scores: Any, num_keep: Any, droppable: Any) -> tuple[Any, ...]:
    """The node of one ``edgeprune::token_select_topk`` call, for ``custom_translation_table``."""
    inputs = {"scores": scores, "num_keep": num_keep, "droppable": droppable}
    return tuple(emit(TOKEN_SELECT, inputs, _OUTPUTS, {"mode": TOPK}))


def translate_soft_nms(
    scores: Any,
    num_keep: Any,
    droppable: Any,
    features: Any,
    places: Any,
    nearness: Any,
    similarity_sigma: float,
) -> tuple[Any, ...]:
    """The node of one ``edgeprune::token_select_soft_nms`` call, for ``custom_translation_table``."""
    inputs = {
        "scores": scores,
        "num_keep": num_keep,
        "droppable": droppable,
        "features": features,
        "places": places,
        "nearness": nearness,
    }
    attributes = {"mode": SOFT_NMS, "similarity_sigma": similarity_sigma}
    return tuple(emit(TOKEN_SELECT, inputs, _OUTPUTS, attributes))


def translate_dpp(
    kernel: Any, num_keep: Any, droppable: Any, groups: Any, group_keep: Any
) -> tuple[Any, ...]:
    """The node of one ``edgeprune::token_select_dpp`` call, for ``custom_translation_table``."""
    inputs = {
        "kernel": kernel,
        "num_keep": num_keep,
        "droppable": droppable,
        "groups": groups,
        "group_keep": group_keep,
    }
    return tuple(emit(TOKEN_SELECT, inputs, _OUTPUTS, {"mode": DPP}))


def specialisation(node: ir.Node) -> tuple[str]:
    """The mode of a node, which its function body is written for."""
    return (node.attributes["mode"].as_string(),)


def precedence(mode: str) -> tuple[int, ...]:
    """Threshold first: its count is not known to the host, so fusing it into one kernel saves most."""
    return (TOKEN_SELECT_MODES.index(mode),)


def function(mode: str, *, opset_version: int = 23) -> ir.Function:
    """The function body for one mode.

    In mode ``topk`` the K of a TopK is ``num_keep`` (within 1 … S), and TensorRT's ITopK takes at most 3840.

    Shapes:
        scores: [P, S] float32, thresholds: [P, S] float32, num_keep: [] int64, droppable: [S] bool,
        features: [S, F] float32, places: [S, 2] int64, nearness: [W] float32,
        kernel: [S, S] float32, groups: [S] int64, group_keep: [S] int64
        keep_indices: [S] int64, keep_count: [] int64
    """
    if mode == SOFT_NMS:
        return _soft_nms(opset_version)
    if mode == DPP:
        return _dpp(opset_version)
    second = "thresholds" if mode == THRESHOLD else "num_keep"
    body = FunctionBody(TOKEN_SELECT, ["scores", second, "droppable"], opset_version=opset_version)
    droppable = body.input("droppable")
    size = body.op("Shape", droppable, name="size")
    start, step = body.constant(0, name="start"), body.constant(1, name="step")
    positions = body.op("Range", start, body.op("Squeeze", size, name="end"), step, name="positions")

    first = body.op("Gather", body.input("scores"), start, name="first_scores", axis=0)
    nan = body.op("IsNaN", first, name="nan")
    usable = body.op("And", droppable, body.op("Not", nan, name="number"), name="usable")
    lowest = body.constant(-np.inf, name="lowest")
    values = body.op("Where", usable, first, lowest, name="values")

    if mode == THRESHOLD:
        chosen = _chosen_by_threshold(body, positions, usable, values)
    else:
        chosen = _chosen_by_rank(body, size, usable, nan, values)
    text = body.op("Not", droppable, name="text")
    keep = body.op("Or", chosen, text, name="keep")
    keep_indices, keep_count = _partition(body, positions, keep)
    return body.function(
        {"keep_indices": keep_indices, "keep_count": keep_count}, {"mode": ir.AttributeType.STRING}
    )


def _soft_nms(opset_version: int) -> ir.Function:
    """The body of mode ``soft_nms``: a Loop over the choices."""
    inputs = ["scores", "num_keep", "droppable", "features", "places", "nearness"]
    body = FunctionBody(TOKEN_SELECT, inputs, opset_version=opset_version)
    droppable = body.input("droppable")
    start, step = body.constant(0, name="start"), body.constant(1, name="step")
    end = body.op("Squeeze", body.op("Shape", droppable, name="size"), name="end")
    positions = body.op("Range", start, end, step, name="positions")

    # Every score is finite, so that minus infinity can mean "not to be had".
    first = body.op("Gather", body.input("scores"), start, name="first_scores", axis=0)
    limits = np.finfo(np.float32)
    lowest = body.constant(float(limits.min), name="lowest")
    highest = body.constant(float(limits.max), name="highest")
    number = body.op("Where", body.op("IsNaN", first, name="nan"), lowest, first, name="number")
    score = body.op("Clip", number, lowest, highest, name="finite")

    features, axis = body.input("features"), body.constant([1], name="feature_axis")
    length = body.op("ReduceL2", features, axis, name="length", keepdims=1)
    shortest = body.constant(1e-12, name="shortest")
    direction = body.op("Div", features, body.op("Max", length, shortest, name="divisor"), name="direction")
    sigma = body.attribute("similarity_sigma", name="sigma")
    half = body.constant(-0.5, name="half")
    slope = body.op("Div", half, body.op("Mul", sigma, sigma, name="sigma_squared"), name="slope")
    table_size = body.op("Shape", body.input("nearness"), name="table_size")
    furthest = body.op("Sub", table_size, step, name="furthest")

    choose = _soft_nms_step(body, direction, slope, furthest)
    # A negative trip count is no limit at all; beyond the number of rows there is nothing to choose.
    at_least_none = body.op("Max", body.input("num_keep"), start, name="at_least_none")
    trips = body.op("Min", at_least_none, end, name="trips")
    _, available = body.loop(trips, choose, score, droppable, name="choices")
    keep = body.op("Not", available, name="keep")
    keep_indices, keep_count = _partition(body, positions, keep)
    attributes = {"mode": ir.AttributeType.STRING, "similarity_sigma": ir.AttributeType.FLOAT}
    return body.function({"keep_indices": keep_indices, "keep_count": keep_count}, attributes)


def _soft_nms_step(outer: FunctionBody, direction: ir.Value, slope: ir.Value, furthest: ir.Value) -> ir.Graph:
    """Choose the highest score among what is to be had, and lower the scores of its likes nearby.

    With nothing left to be had, row 0 is "chosen" again, and nothing changes that anybody reads.
    """
    step = outer.loop_step(["score", "available"])
    score, available = step.input("score"), step.input("available")
    gone = step.constant(-np.inf, name="gone")
    open_scores = step.op("Where", available, score, gone, name="open_scores")
    chosen = step.op("ArgMax", open_scores, name="chosen", axis=0, keepdims=1)
    taken = step.op("Constant", name="taken", value=ir.tensor(np.array([False]), name="taken"))
    left = step.op("ScatterElements", available, chosen, taken, name="left", axis=0)

    places = outer.input("places")
    offset = step.op("Sub", places, step.op("Gather", places, chosen, name="place", axis=0), name="offset")
    row_axis = step.constant([1], name="row_axis")
    squares = step.op("Mul", offset, offset, name="offset_squares")
    squared = step.op("ReduceSum", squares, row_axis, name="squared", keepdims=0)
    entry = step.op("Min", squared, furthest, name="entry")
    near = step.op("Gather", outer.input("nearness"), entry, name="near", axis=0)

    chosen_direction = step.op("Gather", direction, chosen, name="chosen_direction", axis=0)
    column = step.op("Transpose", chosen_direction, name="chosen_column", perm=[1, 0])
    cosine = step.op("Squeeze", step.op("MatMul", direction, column, name="cosines"), row_axis, name="cosine")
    unit = step.constant(1.0, name="unit_score")
    unlike = step.op("Sub", unit, cosine, name="unlike")
    unlike_squared = step.op("Mul", unlike, unlike, name="unlike_squared")
    likeness = step.op("Exp", step.op("Mul", slope, unlike_squared, name="exponent"), name="likeness")
    suppression = step.op("Mul", near, likeness, name="suppression")
    lowered = step.op("Mul", score, step.op("Sub", unit, suppression, name="factor"), name="lowered")
    going = step.op("Identity", step.input("going"), name="still_going")
    return step.graph([going, lowered, left], name="choice")


def _dpp(opset_version: int) -> ir.Function:
    """The body of mode ``dpp``: a Loop over the choices."""
    inputs = ["kernel", "num_keep", "droppable", "groups", "group_keep"]
    body = FunctionBody(TOKEN_SELECT, inputs, opset_version=opset_version)
    droppable, given = body.input("droppable"), body.input("kernel")
    size = body.op("Shape", droppable, name="size")
    start, step = body.constant(0, name="start"), body.constant(1, name="step")
    positions = body.op("Range", start, body.op("Squeeze", size, name="end"), step, name="positions")

    highest = body.constant(float(np.finfo(np.float32).max), name="highest")
    nothing = body.constant(0.0, name="nothing")
    # False for NaN, too.
    finite = body.op("LessOrEqual", body.op("Abs", given, name="absolute"), highest, name="finite")
    kernel = body.op("Where", finite, given, nothing, name="kernel_finite")
    column = body.op("Unsqueeze", positions, body.constant([1], name="column_axis"), name="column")
    diagonal = body.op("GatherElements", kernel, column, name="diagonal_column", axis=1)
    gain = body.op("Squeeze", diagonal, body.constant([1], name="diagonal_axis"), name="diagonal")

    count = body.op("ReduceSum", _int64(body, droppable, "droppable_int"), name="droppable_count", keepdims=1)
    num_keep = body.op(
        "Reshape", body.input("num_keep"), body.constant([1], name="one"), name="num_keep_vector"
    )
    # A negative trip count is no limit at all.
    at_least_none = body.op("Max", num_keep, start, name="at_least_none")
    trips_vector = body.op("Min", at_least_none, count, name="trips_vector")
    trips = body.op("Squeeze", trips_vector, name="trips")
    # Groups share the rows of the factor: no row has more of them than its group keeps.
    largest = body.op("ReduceMax", body.input("group_keep"), name="largest_group", keepdims=1)
    depth = body.op(
        "Min", body.op("Max", largest, start, name="largest_positive"), trips_vector, name="depth"
    )
    shape = body.op("Concat", depth, size, name="factor_shape", axis=0)
    factor = body.op("Expand", nothing, shape, name="no_factor")
    order = body.op("Range", start, body.op("Squeeze", depth, name="depth_scalar"), step, name="order")
    order = body.op("Unsqueeze", order, body.constant([1], name="order_axis"), name="order_column")

    choose = _dpp_step(body, kernel, positions, order)
    carried = (gain, body.input("group_keep"), droppable, factor)
    _, _, available, _ = body.loop(trips, choose, *carried, name="choices")
    keep = body.op("Not", available, name="keep")
    keep_indices, keep_count = _partition(body, positions, keep)
    outputs = {"keep_indices": keep_indices, "keep_count": keep_count}
    return body.function(outputs, {"mode": ir.AttributeType.STRING})


def _dpp_step(outer: FunctionBody, kernel: ir.Value, positions: ir.Value, order: ir.Value) -> ir.Graph:
    """Choose the highest gain among what is to be had, and take from the other gains what it explains.

    With nothing left to be had, row 0 is "chosen": it stays dropped if it was, and explains nothing.
    """
    step = outer.loop_step(["gain", "room", "available", "factor"])
    gain, room, available, factor = (step.input(name) for name in ("gain", "room", "available", "factor"))
    zero, taken = step.constant(0.0, name="zero"), step.constant(0, name="no_room")
    scaled = step.op("Mul", gain, step.constant(DPP_STEPS, name="resolution"), name="scaled")
    steps = step.op("Max", step.op("Round", scaled, name="rounded"), zero, name="steps")
    open_rows = step.op("And", available, step.op("Greater", room, taken, name="has_room"), name="open_rows")
    open_steps = step.op("Where", open_rows, steps, step.constant(-1.0, name="gone"), name="open_steps")
    chosen = step.op("ArgMax", open_steps, name="chosen", axis=0, keepdims=1)
    is_chosen = step.op("Equal", positions, chosen, name="is_chosen")
    closed = step.op("Not", step.op("And", is_chosen, open_rows, name="newly_kept"), name="not_kept")
    left = step.op("And", available, closed, name="left")

    groups = outer.input("groups")
    group = step.op("Equal", groups, step.op("Gather", groups, chosen, name="own_group"), name="group")
    group_int = step.op("Cast", group, name="group_int", to=ir.DataType.INT64.value)
    room_left = step.op("Sub", room, group_int, name="room_left")

    row = step.op("Gather", kernel, chosen, name="row", axis=0)
    shares = step.op("Gather", factor, chosen, name="shares_column", axis=1)
    shares = step.op("Transpose", shares, name="shares", perm=[1, 0])
    unexplained = step.op("Sub", row, step.op("MatMul", shares, factor, name="explained"), name="unexplained")
    own_gain = step.op(
        "Max", step.op("Gather", gain, chosen, name="own_gain"), zero, name="own_gain_positive"
    )
    epsilon = step.constant(DPP_EPSILON, name="epsilon")
    root = step.op("Sqrt", step.op("Add", own_gain, epsilon, name="own_gain_epsilon"), name="root")
    # 0 of no step, -1 of a row that is not to be had.
    own_steps = step.op("Gather", open_steps, chosen, name="own_steps")
    explains = step.op("Greater", own_steps, zero, name="explains")
    scale = step.op("Where", explains, step.op("Reciprocal", root, name="inverse_root"), zero, name="scale")
    entry = step.op("Mul", unexplained, scale, name="entry")
    entry = step.op("Where", group, entry, zero, name="group_entry")
    given_room = step.op("Gather", outer.input("group_keep"), chosen, name="given_room")
    place = step.op("Sub", given_room, step.op("Gather", room, chosen, name="own_room"), name="place")
    is_place = step.op("And", step.op("Equal", order, place, name="is_row"), group, name="is_place")
    factor_next = step.op("Where", is_place, entry, factor, name="factor_next")
    entry_axis = step.constant([0], name="entry_axis")
    flat = step.op("Squeeze", entry, entry_axis, name="flat_entry")
    gain_next = step.op("Sub", gain, step.op("Mul", flat, flat, name="share"), name="gain_next")
    going = step.op("Identity", step.input("going"), name="still_going")
    return step.graph([going, gain_next, room_left, left, factor_next], name="choice")


def _chosen_by_threshold(
    body: FunctionBody, positions: ir.Value, usable: ir.Value, values: ir.Value
) -> ir.Value:
    """The droppable rows above a threshold, or the survivor where there is none."""
    droppable = body.input("droppable")
    above = body.op("Greater", body.input("scores"), body.input("thresholds"), name="above")
    above_int = body.op("Cast", above, name="above_int", to=ir.DataType.INT32.value)
    pair_axis = body.constant([0], name="pair_axis")
    any_int = body.op("ReduceMax", above_int, pair_axis, name="above_any_int", keepdims=0)
    above_any = body.op("Cast", any_int, name="above_any", to=ir.DataType.BOOL.value)
    chosen = body.op("And", above_any, droppable, name="above_droppable")

    # Order of survival, the least first: any chosen row, the best score, other droppable rows, the rest;
    # within one tier by position. At the minimum are all the chosen rows, or else exactly one survivor.
    highest = body.op("ReduceMax", values, name="highest", keepdims=1)
    at_highest = body.op("Equal", values, highest, name="at_highest")
    best = body.op("And", at_highest, usable, name="best")
    tiers = [body.constant(i * _TIER, name=f"tier_{i}") for i in range(3)]
    other = body.op("Where", droppable, tiers[1], tiers[2], name="tier_other")
    tier = body.op("Where", best, tiers[0], other, name="tier")
    order = body.op("Add", tier, positions, name="order")
    front = body.constant(-1, name="front")
    order = body.op("Where", chosen, front, order, name="order_chosen")
    least = body.op("ReduceMin", order, name="least", keepdims=1)
    return body.op("Equal", order, least, name="chosen")


def _chosen_by_rank(
    body: FunctionBody, size: ir.Value, usable: ir.Value, nan: ir.Value, values: ir.Value
) -> ir.Value:
    """The droppable rows among the ``num_keep`` best: above the last kept value, equal to it, and NaN."""
    one = body.constant([1], name="one")
    num_keep = body.op("Reshape", body.input("num_keep"), one, name="num_keep_vector")
    # K must depend on shapes and num_keep alone: TensorRT takes no K computed from data.
    at_least_one = body.op("Max", num_keep, one, name="at_least_one")
    k = body.op("Min", at_least_one, size, name="k")
    top = body.op("TopK", values, k, name="top_values", axis=0)
    last = body.op("ReduceMin", top, name="last_value", keepdims=1)
    above = body.op("Greater", values, last, name="above")
    equal = body.op("Equal", values, last, name="equal")
    equal = body.op("And", equal, usable, name="equal_usable")
    lost = body.op("And", body.input("droppable"), nan, name="lost")
    chosen_equal = _first_places(body, equal, num_keep, above, "equal")
    chosen_lost = _first_places(body, lost, num_keep, usable, "lost")
    chosen = body.op("Or", above, chosen_equal, name="chosen_usable")
    return body.op("Or", chosen, chosen_lost, name="chosen")


def _first_places(
    body: FunctionBody, rows: ir.Value, num_keep: ir.Value, before: ir.Value, name: str
) -> ir.Value:
    """Of ``rows``, the first in order, as many as ``num_keep`` leaves after the rows of ``before``."""
    axis = body.constant(0, name=f"{name}_axis")
    taken = _int64(body, before, f"{name}_before")
    taken = body.op("ReduceSum", taken, name=f"{name}_taken", keepdims=1)
    room = body.op("Sub", num_keep, taken, name=f"{name}_room")
    place = body.op("CumSum", _int64(body, rows, f"{name}_int"), axis, name=f"{name}_place")
    fits = body.op("LessOrEqual", place, room, name=f"{name}_fits")
    return body.op("And", rows, fits, name=f"{name}_chosen")


def _partition(body: FunctionBody, positions: ir.Value, keep: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The permutation that moves the kept rows to the front, and their number."""
    axis, one = body.constant(0, name="row_axis"), body.constant(1, name="unit")
    kept = _int64(body, keep, "kept")
    count = body.op("ReduceSum", kept, name="keep_count", keepdims=0)
    kept_until = body.op("CumSum", kept, axis, name="kept_until")
    to_front = body.op("Sub", kept_until, one, name="to_front")
    dropped_before = body.op("Sub", positions, kept_until, name="dropped_before")
    to_back = body.op("Add", dropped_before, count, name="to_back")
    target = body.op("Where", keep, to_front, to_back, name="target")
    return body.op("ScatterElements", positions, target, positions, name="keep_indices", axis=0), count


def _int64(body: FunctionBody, value: ir.Value, name: str) -> ir.Value:
    return body.op("Cast", value, name=name, to=ir.DataType.INT64.value)
