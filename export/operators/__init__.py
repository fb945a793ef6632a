"""The operators of domain ``edgeprune`` in ONNX: one node each, with a function of standard operators.

Export in two steps, because torch.onnx.export inlines every function it is given: ``TRANSLATIONS`` makes each
custom operator one opaque node, ``attach_functions`` then adds the functions to the exported model::

    program = torch.onnx.export(module, args, dynamo=True, custom_translation_table=TRANSLATIONS)
    attach_functions(program.model)

One name, one body. A function cannot branch on a string attribute, so its body is written for the attribute
values of its calls. ONNX tells two bodies of one name apart by ``overload`` or by domain, and so do
onnx.checker and ONNX Runtime 1.31. TensorRT's parser (10.1 by its source, TensorRT for RTX 1.7.1 by test)
looks functions up by name alone and silently runs the first body for both. A second name would be a second
plugin, as the parser looks plugins up by op_type. So at most one specialisation of an operator stays a node
with a function, the one that gains most from the plugin, and the calls of the others are expanded in place
into the same operators.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

# Importing the torch references registers torch.ops.edgeprune.
import edgeprune.operators.attention_score
import edgeprune.operators.token_gather
import edgeprune.operators.token_select  # noqa: F401
from edgeprune.export.operators import attention_score, token_gather, token_select
from edgeprune.operators.schema import (
    ATTENTION_SCORE,
    OPERATOR_DOMAIN,
    OPERATOR_VERSION,
    TOKEN_GATHER,
    TOKEN_SELECT,
)

__all__ = ["TRANSLATIONS", "attach_functions"]

TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.edgeprune.attention_score.default: attention_score.translation,
    torch.ops.edgeprune.token_select_threshold.default: token_select.translate_threshold,
    torch.ops.edgeprune.token_select_topk.default: token_select.translate_topk,
    torch.ops.edgeprune.token_select_soft_nms.default: token_select.translate_soft_nms,
    torch.ops.edgeprune.token_select_dpp.default: token_select.translate_dpp,
    torch.ops.edgeprune.token_gather.default: token_gather.translation,
}
"""For ``torch.onnx.export(custom_translation_table=…)``: torch operator to the node that stands for it."""

_OPERATORS: dict[str, ModuleType] = {
    ATTENTION_SCORE: attention_score,
    TOKEN_SELECT: token_select,
    TOKEN_GATHER: token_gather,
}


def attach_functions(model: ir.Model) -> None:
    """Give the operator nodes of a model their functions, in place.

    Afterwards the model holds one function per operator that it uses, and any runtime can run it. Where the
    nodes of one operator need different bodies, one body is attached and the other nodes are expanded in
    place (the module's text says why).

    Args:
        model: A model exported with ``TRANSLATIONS``.
    """
    opset_version = model.opset_imports[""]
    nodes: dict[str, dict[tuple[Any, ...], list[ir.Node]]] = {}
    for node in model.graph.all_nodes():
        if node.domain == OPERATOR_DOMAIN and node.op_type in _OPERATORS:
            specialisation = _OPERATORS[node.op_type].specialisation(node)
            nodes.setdefault(node.op_type, {}).setdefault(specialisation, []).append(node)

    for operator, specialisations in nodes.items():
        module = _OPERATORS[operator]
        ordered = sorted(specialisations, key=lambda values: module.precedence(*values))
        for i, values in enumerate(ordered):
            function = module.function(*values, opset_version=opset_version)
            if i > 0:
                _mark_for_expansion(function, specialisations[values], str(i))
            model.functions[function.identifier()] = function
    if nodes:
        InlinePass(criteria=lambda function: function.overload != "")(model)
        model.opset_imports[OPERATOR_DOMAIN] = OPERATOR_VERSION


def _mark_for_expansion(function: ir.Function, calls: list[ir.Node], mark: str) -> None:
    """Tell the inliner which nodes to expand: those of an overload; none has one afterwards."""
    function.overload = mark
    for call in calls:
        call.overload = mark
    for node in function.all_nodes():
        # The other body has nodes of the same names, and TensorRT's parser wants them unique in the model.
        node.name = f"{node.name}_{mark}"
