"""Names of the tensors that travel between graphs: one table for export, runtimes and plugins.

The names that other runtimes know (``input_ids``, ``past_key_values.0.key`` …) are theirs; the rest is ours.
S = rows of the sequence now, P = cached rows, K = kept rows, M = pictures, T = tiles, G = grids of visual tokens,
N = visual tokens, R = probe rows, A = position ids of a row: 1, or 3 with M-RoPE,
J = decoder layers behind which DeepStack adds.
"""

PIXEL_VALUES = "pixel_values"  # [T, 3, height, width], tiles; or [patches, values]
PATCH_POSITIONS = "patch_positions"  # [patches, 2] int64: row and column of a patch in its picture
PICTURE_ROWS = "picture_rows"  # [M, longest] int64: the patches of each picture, -1 behind the last
WINDOW_ROWS = (
    "window_rows"  # [windows, longest] int64: the patches of each attention window, -1 behind the last
)
PATCH_FEATURES = "patch_features"  # [T·K, F] behind the vision tower, tile after tile
PATCH_SLOTS = "patch_slots"  # [T·K] int64: tile index · tokens per tile + row-major index
PATCH_COUNTS = (
    "patch_counts"  # [T] int64: how many of a tile's K rows are tokens, where the number depends on it
)
FEATURE_ROWS = (
    "feature_rows"  # [N] int64: rows of patch_features in the order of the prompt; -1 - slot: inserted
)
IMAGE_FEATURES = "image_features"  # [N, C] after the projector, all pictures one after the other
IMAGE_SLOTS = "image_slots"  # [N] int64: the slot (edgeprune.visual_layout) of every visual token
IMAGE_DEEPSTACK_FEATURES = (
    "image_deepstack_features"  # [J, N, C] by visual token: what is added behind layer j (DeepStack)
)
INPUT_IDS = "input_ids"  # [1, S] int64
INPUTS_EMBEDS = "inputs_embeds"  # [1, S, C]
HIDDEN_STATES = "hidden_states"  # [1, S, C]
POSITION_IDS = "position_ids"  # [A, S] int64, positions in the unpruned sequence
DEEPSTACK_FEATURES = "deepstack_features"  # the same by row of the sequence, [J, S, C]: zeros in rows of text
VISUAL_SLOTS = "visual_slots"  # [S] int64: the slot of a visual token, -1 for text
KEEP_INDICES = "keep_indices"  # [S] int64, the kept rows first, in the order of the sequence
KEEP_COUNT = "keep_count"  # [] int64
SCORES = "scores"  # [S] float32: what a site that lets the host choose scores its rows with
NUM_KEEP = "num_keep"  # [] int64: visual tokens to keep, where the count is known beforehand
TEXT_ROWS = "text_rows"  # [T] int64: rows after the last visual token
PROMPT_SLOTS = "prompt_slots"  # visual_slots of the unpruned prompt, int64
PROMPT_TEXT_ROWS = "prompt_text_rows"  # [T] int64: text_rows in the unpruned prompt
RECYCLED_IDS = (
    "recycled_ids"  # int64, 0 … number of dropped tokens that are looked through for merging, minus 1
)
MERGED_IDS = "merged_ids"  # int64, 0 … number of tokens that they are merged into, minus 1
VISUAL_RANKS = "visual_ranks"  # [S] int64: importance of a visual token, 0 the highest, -1 for text
RATE = "rate"  # [] int64: index of the share of visual tokens removed
CACHED_KEY = "cached_key"  # [1, Hkv, P, D], of any layer
CACHED_VALUE = "cached_value"  # [1, Hkv, P, D], of any layer
CONTEXT_ROWS = "context_rows"  # rows up to the last visual token, int64
GRID_IDS = "grid_ids"  # [G] int64: 0 … G-1
GRID_KEEP = "grid_keep"  # [G] int64: visual tokens to keep of each grid, where the count is known beforehand
VISUAL_PLACES = (
    "visual_places"  # int64 by slot: grid, row and column of a token, rows and columns of its grid
)
LOGITS = "logits"  # [1, V], of the last row
PROBE_WEIGHTS = "probe_weights"  # [R, S] float32: probe row = weighted sum of the hidden states …
PROBE_OFFSET = "probe_offset"  # [R, C] … plus this
PROBE_POSITION_IDS = "probe_position_ids"  # [A, R] int64
CLASS_FEATURES = "class_features"  # [M, C]: the class token at the feature layer, through the projector
IMAGE_EMBEDS = "image_embeds"  # [M, E]: the picture in CLIP's shared space
GUIDE_INPUT_IDS = "guide_input_ids"  # [Q, 77] int64: CLIP's tokens of the instruction, in chunks
GUIDE_TOKEN_MAP = "guide_token_map"  # [T, Q·77] float32: row-normalised map from CLIP's tokens to text rows


def out(name: str) -> str:
    """The name of an output whose input twin is called ``name``."""
    return f"out.{name}"


def extended(name: str) -> str:
    """What travels between segments with rows appended by a site that merges tokens, [… S + merged …]."""
    return f"extended.{name}"


def past_key(layer: int) -> str:
    """Cached keys of a layer, [1, Hkv, P, D]."""
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    """Cached values of a layer, [1, Hkv, P, D]."""
    return f"past_key_values.{layer}.value"


def present_key(layer: int) -> str:
    """Keys of a layer, cache included, [1, Hkv, P + S, D]."""
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    """Values of a layer, cache included, [1, Hkv, P + S, D]."""
    return f"present.{layer}.value"


def query(layer: int) -> str:
    """Queries of a layer after the rotary embedding, [1, H, S, D]."""
    return f"query.{layer}"


def probe_query(layer: int) -> str:
    """Queries of the probe rows, [1, H, R, D]."""
    return f"probe_query.{layer}"


def probe_key(layer: int) -> str:
    """Keys of the probe rows, [1, Hkv, R, D]."""
    return f"probe_key.{layer}"
