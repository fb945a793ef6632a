"""Names that the torch, ONNX and TensorRT faces of the operators share.

No torch, no onnx: the plugin's build and the runtimes read this file too.
"""

OPERATOR_DOMAIN = "edgeprune"
"""Domain of the operators in ONNX and namespace of the torch custom operators."""

OPERATOR_VERSION = 1
"""Version of the domain in an ONNX model's opset imports."""

PLUGIN_NAMESPACE = "edgeprune"
"""Namespace under which the TensorRT plugin creators register; each node carries it as an attribute."""

PLUGIN_VERSION = "1"
"""Version of the TensorRT plugin creators; each node carries it as an attribute."""

PLUGIN_LIBRARY_VERSION = 1
"""Of the library with the creators; it must be this one, as ``plugins/tensorrt/plugin_version.h`` says it."""

ATTENTION_SCORE = "AttentionScore"
TOKEN_SELECT = "TokenSelect"
TOKEN_GATHER = "TokenGather"

PROBABILITIES = "probabilities"
LOGITS = "logits"
ATTENTION_SCORE_MODES = (PROBABILITIES, LOGITS)

THRESHOLD = "threshold"
TOPK = "topk"
SOFT_NMS = "soft_nms"
DPP = "dpp"
TOKEN_SELECT_MODES = (THRESHOLD, SOFT_NMS, DPP, TOPK)

SCORE_SELECT = "ScoreSelect"
"""AttentionScore and TokenSelect in one plugin; no bundle has it, a build makes it of the two."""

PLUGIN_MODES = {
    ATTENTION_SCORE: ATTENTION_SCORE_MODES,
    TOKEN_SELECT: TOKEN_SELECT_MODES,
    TOKEN_GATHER: (),
}
"""What the plugins compute: the modes of each operator, none for one that has no modes."""

PLUGIN_MAX_ROWS = 16384
"""Most rows of a sequence that TokenSelect's kernels take."""

DPP_STEPS = 2.0**16
"""Gains of mode ``dpp`` are compared in steps of one over this."""

DPP_EPSILON = 1e-6
"""Added to a gain of mode ``dpp`` before its square root is divided by, as OpenVINO GenAI's CDPruner does."""

MAX_GATHERED = 8
"""Most data tensors that one TokenGather takes."""
