"""The methods' equations in NumPy and float64, every attention matrix written out."""

import numpy as np


def attention_logits(query, key):
    """[H, S, S] from query [H, S, D] and key [Hkv, S, D]."""
    key = np.repeat(key, query.shape[0] // key.shape[0], axis=0)
    return query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])


def causal_softmax(logits):
    hidden = np.triu(np.ones(logits.shape[-2:], dtype=bool), 1)
    logits = np.where(hidden, -np.inf, logits)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalised(score, rows, norm):
    if norm == "sigmoid":
        return sigmoid(score[rows])
    if norm == "minmax":
        low, high = score[rows].min(), score[rows].max()
        return (score[rows] - low) / max(high - low, 1e-6)
    return score[rows]


def spatial_table(grid, strides, scale):
    """Eq. 5 token by token."""
    rows, columns = grid
    table = np.zeros(grid)
    for r in range(rows):
        for c in range(columns):
            for stride in strides:
                if r % stride == 0 and c % stride == 0:
                    sampled = len(range(0, rows, stride)) * len(range(0, columns, stride))
                    table[r, c] = max(table[r, c], 1 - scale * sampled / (rows * columns))
    return table.ravel()


def atp_reference(method, grid, query, key, slots, num_text, num_images, heads):
    """Kept rows [S] bool, and how far each row is from the other decision [S]."""
    num_patches = grid[0] * grid[1]
    logits = attention_logits(query, key)
    cross = causal_softmax(logits)[:, -num_text:].mean(axis=(0, 1))
    spatial = spatial_table(grid, method.strides, method.sample_scale)
    kept, margin = np.ones(len(slots), dtype=bool), np.full(len(slots), np.inf)
    best, visual = -np.inf, np.flatnonzero(slots >= 0)
    for image in range(num_images):
        rows = np.flatnonzero((slots >= 0) & (slots // num_patches == image))
        if not len(rows):
            continue
        self_score = logits[:, rows].mean(axis=(0, 1))
        self_score, cross_score = (
            normalised(self_score, rows, method.self_norm),
            normalised(cross, rows, method.cross_norm),
        )
        by_grid = np.zeros(2 * num_patches)
        for n, row in enumerate(rows):
            by_grid[slots[row] - image * num_patches] = self_score[n]
            by_grid[num_patches + slots[row] - image * num_patches] = cross_score[n]
        z = heads["proj.weight"] @ by_grid + heads["proj.bias"]
        theta_r = sigmoid(heads["head_r.weight"] @ z + heads["head_r.bias"])[0]
        theta_s = sigmoid(heads["head_s.weight"] @ z + heads["head_s.bias"])[0]
        redundant, position = (self_score + cross_score) / 2, spatial[slots[rows] % num_patches]
        kept[rows] = (redundant > theta_r) | (position > theta_s)
        # A position that no grid samples scores 0 exactly, below any threshold.
        margin[rows] = abs(np.maximum(redundant - theta_r, np.where(position > 0, position - theta_s, -1)))
        if redundant.max() > best:
            best, survivor = redundant.max(), rows[redundant.argmax()]
    if not kept[visual].any():
        kept[survivor] = True
    return kept, margin


def rollout(matrices):
    """Eq. 3 in full: Ã¹ = A¹, Ãˡ = (Aˡ + I)Ãˡ⁻¹, rows summing to one again; matrices [S, S], lowest first."""
    rolled = matrices[0]
    for matrix in matrices[1:]:
        rolled = (matrix + np.eye(len(matrix))) @ rolled
        rolled = rolled / rolled.sum(axis=1, keepdims=True)
    return rolled


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def mean_attention(query, key, *, causal):
    """[S, S], heads averaged first, from query [H, S, D] and key [Hkv, S, D]."""
    logits = attention_logits(query, key)
    return (causal_softmax(logits) if causal else softmax(logits)).mean(axis=0)


def value_norms(value):
    """[S] from [H, S, D]: the norm over the concatenated heads."""
    return np.linalg.norm(value.transpose(1, 0, 2).reshape(value.shape[1], -1), axis=1)


def highest(scores, count):
    """Indices of the highest scores, ties to the lower index, ascending."""
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return sorted(ranked[:count])


def ivtp_decoder_scores(context, probes, values):
    """Scores of the rows before the instruction.

    context: per layer, (query [H, S', D], key [Hkv, S', D]); values: [Hkv, S', D] of the top layer;
    probes: per layer, the pseudo-CLS row's (query [H, 1, D], key [Hkv, 1, D]).
    """
    matrices = [
        mean_attention(
            np.concatenate([query, probe_query], axis=1),
            np.concatenate([key, probe_key], axis=1),
            causal=True,
        )
        for (query, key), (probe_query, probe_key) in zip(context, probes, strict=True)
    ]
    return rollout(matrices)[-1, :-1] * value_norms(values)


def last_row_scores(query, key):
    """[S] from query [H, S, D] and key [Hkv, S, D]: the last row's attention, heads averaged."""
    return softmax(attention_logits(query, key)[:, -1:]).mean(axis=(0, 1))


def adaptprune_kept(scores, keys, slots, grid, count, method):
    """Kept visual rows, ascending, and the smallest relative gap by which any choice was made.

    scores: [S]; keys: [S, F]; slots: [S].
    """
    rows, columns = grid
    patches = rows * columns
    centre = np.zeros(patches)
    for slot in range(patches):
        y = (slot // columns) * rows / (rows - 1) - rows / 2
        x = (slot % columns) * columns / (columns - 1) - columns / 2
        centre[slot] = np.exp(-(y**2) / (2 * (rows / 2) ** 2) - x**2 / (2 * (columns / 2) ** 2))
    centre /= centre.max()
    left = {row: scores[row] * centre[slots[row] % patches] for row in np.flatnonzero(slots >= 0)}
    kept, gap = [], np.inf
    while left and len(kept) < count:
        best = min(left, key=lambda row: (-left[row], row))
        others = [left[best] - value for row, value in left.items() if row != best and value != left[best]]
        gap = min([gap, *(difference / left[best] for difference in others if left[best] > 0)])
        kept.append(best)
        del left[best]
        for row in left:
            if slots[row] // patches != slots[best] // patches:
                continue
            here, there = slots[row] % patches, slots[best] % patches
            distance = np.hypot(here // columns - there // columns, here % columns - there % columns)
            if distance > method.max_distance:
                continue
            cosine = keys[row] @ keys[best] / np.linalg.norm(keys[row]) / np.linalg.norm(keys[best])
            near = np.exp(-(distance**2) / (2 * method.distance_sigma**2))
            like = np.exp(-((1 - cosine) ** 2) / (2 * method.similarity_sigma**2))
            left[row] *= 1 - near * like
    return sorted(kept), gap


def _span_volume(kernel, rows):
    """The determinant of some rows' similarities: the squared volume that they span."""
    return np.linalg.det(kernel[np.ix_(rows, rows)]) if rows else 1.0


def greedy_dpp(kernel, count, step=2.0**-16):
    """The first ``count`` rows of the greedy MAP, by ratios of determinants, and how clear the closest choice was.

    What gains less than half a step gains nothing: it spans nothing new and goes by index.
    """
    kept, spanning, clear = [], [], np.inf
    for _ in range(count):
        volume = _span_volume(kernel, spanning)
        gains = {
            row: max(0.0, _span_volume(kernel, [*spanning, row]) / volume)
            for row in range(len(kernel))
            if row not in kept
        }
        best = max(gains.values())
        # Far below a step: equal rows, and the length of a unit row with a small number under its root.
        first = min(row for row, gain in gains.items() if best - gain < step / 8 or best < step / 2)
        if best >= step / 2:
            differences = [best - gain for gain in gains.values() if best - gain >= step / 8]
            clear = min([clear, best - step / 2, *differences])
            spanning.append(first)
        kept.append(first)
    return kept, clear


def cdpruner_kept(embeds, slots, patches, keep, method):
    """Kept rows, ascending, and how clear the closest choice was; embeds [S, C], slots [S], keep per picture."""

    def unit(rows):
        return rows / np.sqrt((rows**2).sum(axis=-1, keepdims=True) + 1e-6)

    text = unit(embeds[slots < 0].mean(axis=0))
    kept, clear = [], np.inf
    for picture in np.unique(slots[slots >= 0] // patches):
        rows = np.flatnonzero((slots >= 0) & (slots // patches == picture))
        parts = [(rows, keep)]
        if method.halves:
            middle = len(rows) // 2
            parts = [(rows[:middle], keep // 2), (rows[middle:], keep - keep // 2)]
        for part, count in parts:
            if not len(part):
                continue
            f = unit(embeds[part])
            r = f @ text * (-1 if method.negative_relevance else 1)
            span = r.max() - r.min()
            r = (r - r.min()) / (span if span >= 1e-6 else 1.0)
            w, S = method.relevance_weight, f @ f.T
            if method.weighting == "blended":
                L = (1 - w) * S + w * np.diag(r) @ S @ np.diag(r)
            else:
                weight = np.exp(w / (2 * (1 - w)) * r)
                L = np.diag(weight) @ S @ np.diag(weight) / np.exp(w / (1 - w))
            chosen, margin = greedy_dpp(L, min(count, len(part)))
            kept += part[chosen].tolist()
            clear = min(clear, margin)
    return sorted(kept), clear


def dart_kept(norms, features, slots, patches, keep, first_text_row, method):
    """Kept rows, ascending, and how clear the closest choice was; text rows before ``first_text_row`` are no pivots."""
    clear = np.inf

    def sort(rows, value, count):
        """The rows with the lowest values, and how far the last taken is from the first left."""
        nonlocal clear
        ordered = sorted(rows, key=lambda row: (value[row], row))
        if 0 < count < len(ordered):
            difference = value[ordered[count]] - value[ordered[count - 1]]
            clear = min(clear, difference) if difference > 1e-10 else clear
        return ordered[:count]

    text_pivots = sort(
        [row for row in np.flatnonzero(slots < 0) if row >= first_text_row],
        np.round(-norms, 9),
        method.text_pivots,
    )
    kept = []
    for picture in np.unique(slots[slots >= 0] // patches):
        rows = np.flatnonzero((slots >= 0) & (slots // patches == picture)).tolist()
        target = min(keep, len(rows))
        pivots = sort(rows, np.round(-norms, 9), min(method.image_pivots, target))
        mine, queue = list(pivots), [*pivots, *text_pivots]
        while queue and len(mine) < target:
            share = -(-(target - len(mine)) // len(queue))
            pivot = queue.pop(0)
            lengths = np.linalg.norm(features[pivot]) * np.linalg.norm(features, axis=1)
            cosine = np.round(features @ features[pivot] / np.maximum(lengths, 1e-12), 9)
            mine += sort([row for row in rows if row not in mine], cosine, share)
        kept += mine
    return sorted(int(row) for row in kept), clear
