"""Stage two: projector and decoder, many questions about one picture in one sequence.

A packed sequence is a prefix (``<s>USER: `` and the visual tokens) followed by segments (a
question with its answer). A segment sees the prefix and itself, and its positions continue where
the prefix ends, so each segment is computed exactly as if it had been asked alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from muon import Optimizer
from numpy.typing import NDArray
from questions import COLUMNS, KINDS, ask
from scenes import (
    CELLS,
    CHARACTERS,
    COLORS,
    GRID,
    SHAPES,
    SIZES,
    Scene,
    dense_labels,
    describe,
    draw_scene,
    patch_owners,
    render,
)
from torch import Tensor, nn
from tower import normalise
from transformers import (
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

VISUAL = GRID * GRID
WIDTH = 128
ON_OBJECT = len(COLORS) + len(SHAPES) + len(SIZES) + 1 + len(CHARACTERS)
EASY_KINDS = ("background", "any_color", "any_shape", "count_all", "shape_of")
"""Learned first, so asked about half of the pictures only."""
HARD_KINDS = ("count_side", "count_side", "count_some", "color_of", "column_of", "side", "holder_of")
"""Asked more than once about a picture."""
CAPTION_PROMPT = "describe the picture."
QUESTION_SLOTS = 16
QUESTION_LENGTH = 18
CAPTION_LENGTH = 42


def prefix_text() -> str:
    """What stands before the picture."""
    return "USER: "


def segment_text(question: str) -> str:
    """What stands between the picture and the answer."""
    return f"\n{question} ASSISTANT:"


def llava_config(tokenizer: PreTrainedTokenizerFast, clip: CLIPModel) -> LlavaConfig:
    """Twelve narrow layers with grouped-query attention on top of the CLIP vision tower."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=clip.config.vision_config.to_dict(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Pack:
    """A batch of pictures with their segments; ids are padded with the pad token.

    ``answers`` holds the token to predict at each place, or -100.
    """

    raw: Tensor
    owners: Tensor
    questions: Tensor
    question_answers: Tensor
    captions: Tensor
    caption_answers: Tensor


def encode_segment(
    tokenizer: PreTrainedTokenizerFast, question: str, answer: str, length: int
) -> tuple[list[int], list[int]]:
    """Input ids and shifted targets of one segment."""
    asked: list[int] = tokenizer.encode(segment_text(question), add_special_tokens=False)
    answered: list[int] = tokenizer.encode(f" {answer}</s>", add_special_tokens=False)
    ids = asked + answered
    targets = [-100] * (len(asked) - 1) + answered + [-100]
    if len(ids) > length:
        raise ValueError(f"segment of {len(ids)} tokens, room for {length}: {question!r}")
    pad = length - len(ids)
    return ids + [tokenizer.pad_token_id] * pad, targets + [-100] * pad


class Packs(torch.utils.data.Dataset[Pack]):
    """Batch ``i`` is a function of the seed and ``i``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batches: int, size: int) -> None:
        self.tokenizer, self.seed, self.batches, self.size = tokenizer, seed, batches, size
        self.known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def _encode(self, question: str, answer: str, length: int) -> tuple[list[int], list[int]]:
        """Questions repeat, so most of them are encoded once."""
        key = (question, answer)
        if key not in self.known:
            self.known[key] = encode_segment(self.tokenizer, question, answer, length)
        return self.known[key]

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Pack:
        rng = random.Random(f"decoder {self.seed} {index}")
        raw, owners = [], []
        questions: list[tuple[list[int], list[int]]] = []
        captions: list[tuple[list[int], list[int]]] = []
        for _ in range(self.size):
            scene = draw_scene(rng)
            raw.append(np.asarray(render(scene)))
            owners.append(patch_owners(scene).reshape(-1))
            kinds = [kind for kind in KINDS if kind not in EASY_KINDS or rng.random() < 0.5]
            asked = [q for q in (ask(scene, rng, kind) for kind in kinds) if q is not None]
            while len(asked) < QUESTION_SLOTS:
                extra = ask(scene, rng, rng.choice(HARD_KINDS))
                if extra is not None:
                    asked.append(extra)
            questions += [self._encode(q.text, q.answer, QUESTION_LENGTH) for q in asked]
            captions.append(encode_segment(self.tokenizer, CAPTION_PROMPT, describe(scene), CAPTION_LENGTH))
        asked_ids = torch.tensor(questions).view(self.size, QUESTION_SLOTS, 2, QUESTION_LENGTH)
        caption_ids = torch.tensor(captions).view(self.size, 1, 2, CAPTION_LENGTH)
        return Pack(
            torch.from_numpy(np.stack(raw)),
            torch.from_numpy(np.stack(owners)),
            asked_ids[:, :, 0],
            asked_ids[:, :, 1],
            caption_ids[:, :, 0],
            caption_ids[:, :, 1],
        )


def hide_tokens(owners: Tensor, layers: int, generator: torch.Generator) -> Tensor:
    """Which visual tokens each layer sees, True = seen; shape (layers, batch, visual).

    Half of the pictures are seen whole. Of the others, a random share of the visual tokens is
    hidden from a random layer on: background first, or at random with a few patches of every
    object spared. It makes the decoder content with few tokens per object.
    """
    batch = owners.shape[0]
    score = torch.rand(owners.shape, generator=generator)
    spare = torch.rand(owners.shape, generator=generator)
    for index in range(int(owners.max()) + 1):
        mine = owners == index
        best = torch.where(mine, spare, -1.0).topk(2, dim=1).indices
        score.scatter_add_(1, best, 2.0 * torch.gather(mine, 1, best).float())
    mode = torch.rand(batch, generator=generator)
    background_first = (mode < 0.25)[:, None] & (owners >= 0)
    score = score + 1.0 * background_first
    share = 0.15 + 0.75 * torch.rand(batch, generator=generator)
    share = torch.where(mode < 0.5, share, 0.0)
    rank = score.argsort(dim=1).argsort(dim=1)
    hidden = rank < (share * owners.shape[1])[:, None]
    start = torch.randint(0, layers - 2, (batch,), generator=generator)
    reached = torch.arange(layers)[:, None] >= start[None]
    return ~(hidden[None] & reached[:, :, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _blocks(x: Tensor, count: int, length: int) -> Tensor:
    return x.view(*x.shape[:2], count, length, x.shape[-1])


class Whitening:
    """Centres and decorrelates patch features while the projector trains.

    The tower's features are large and a few directions dominate them, which a first-order
    optimizer bears badly. So the projector's first layer is trained on whitened input; ``leave``
    folds the whitening into its weights, and ``enter`` takes it out again.
    """

    def __init__(self, features: Tensor) -> None:
        rows = features.flatten(0, -2).double()
        self.mean: Tensor = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(rows.T))
        spread = (values.clamp(min=0) + 0.01 * values.mean()).sqrt()
        self.root = (vectors * spread) @ vectors.T
        self.inverse: Tensor = (vectors / spread) @ vectors.T

    def __call__(self, features: Tensor) -> Tensor:
        """Whitened features, in single precision."""
        centred: Tensor = features.float() - self.mean.float()
        return centred @ self.inverse.float()

    @torch.no_grad()
    def enter(self, first: nn.Linear) -> None:
        """From plain to whitened input."""
        weight = first.weight.double()
        first.bias.copy_(first.bias.double() + weight @ self.mean)
        first.weight.copy_(weight @ self.root)

    @torch.no_grad()
    def leave(self, first: nn.Linear) -> None:
        """From whitened to plain input."""
        weight = first.weight.double() @ self.inverse
        first.bias.copy_(first.bias.double() - weight @ self.mean)
        first.weight.copy_(weight)


class PackedDecoder:
    """Runs the modules of a LLaVA model on packed sequences."""

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model
        self.language = model.model.language_model
        self.projector = model.model.multi_modal_projector
        ids = tokenizer.encode(prefix_text())
        self.prefix_ids = torch.tensor(ids)
        self.prefix = len(ids) + VISUAL
        config = model.config.text_config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.causal = torch.full((self.prefix, self.prefix), float("-inf")).triu(1)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:-1], heads, self.head_dim).transpose(1, 2)

    def __call__(self, features: Tensor, groups: Sequence[Tensor], seen: Tensor | None) -> list[Tensor]:
        """Last hidden states of every group of segments, each (batch, segments, length, width)."""
        embed = self.language.embed_tokens
        batch = features.shape[0]
        start = embed(self.prefix_ids).expand(batch, -1, -1)
        visual = self.projector(features)
        parts = [start, visual.to(start.dtype), *(embed(g).flatten(1, 2) for g in groups)]
        x = torch.cat(parts, dim=1)
        positions = [torch.arange(self.prefix)]
        positions += [(self.prefix + torch.arange(g.shape[2])).repeat(g.shape[1]) for g in groups]
        cos, sin = self.language.rotary_emb(x, torch.cat(positions)[None])
        cos, sin = cos[:, None], sin[:, None]
        if torch.is_autocast_enabled("cpu"):
            cos, sin = cos.to(torch.bfloat16), sin.to(torch.bfloat16)
        masks = [torch.full((g.shape[2], g.shape[2]), float("-inf")).triu(1) for g in groups]
        scale = self.head_dim**-0.5
        repeat = self.heads // self.kv_heads
        for index, layer in enumerate(self.language.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(x)
            q = _rotate(self._heads(attention.q_proj(normed), self.heads), cos, sin) * scale
            k = _rotate(self._heads(attention.k_proj(normed), self.kv_heads), cos, sin)
            v = self._heads(attention.v_proj(normed), self.kv_heads)
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
            kp, vp = k[:, :, : self.prefix], v[:, :, : self.prefix]
            block = None
            if seen is not None:
                block = torch.zeros(batch, 1, 1, self.prefix)
                block[:, 0, 0, len(self.prefix_ids) :].masked_fill_(~seen[index], -1e4)
            mask = self.causal if block is None else self.causal + block
            # A hidden token still sees itself: what it computes is seen by nobody.
            scores = (q[:, :, : self.prefix] @ kp.mT).float() + mask
            mixed = [scores.softmax(-1).to(vp.dtype) @ vp]
            at = self.prefix
            for group, own_mask in zip(groups, masks, strict=True):
                count, length = group.shape[1:]
                piece = slice(at, at + count * length)
                at += count * length
                qs = q[:, :, piece]
                to_prefix = (qs @ kp.mT).float()
                if block is not None:
                    to_prefix = to_prefix + block
                own = _blocks(qs, count, length) @ _blocks(k[:, :, piece], count, length).mT
                own = (own.float() + own_mask).flatten(2, 3)
                weight = torch.cat([to_prefix, own], dim=-1).softmax(-1).to(vp.dtype)
                near = _blocks(weight[..., self.prefix :], count, length) @ _blocks(
                    v[:, :, piece], count, length
                )
                mixed.append(weight[..., : self.prefix] @ vp + near.flatten(2, 3))
            x = x + attention.o_proj(torch.cat(mixed, dim=2).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        x = self.language.norm(x)
        states = []
        at = self.prefix
        for group in groups:
            count, length = group.shape[1:]
            states.append(x[:, at : at + count * length].unflatten(1, (count, length)))
            at += count * length
        return states

    def logits(self, state: Tensor) -> Tensor:
        """Scores of the next token."""
        scores: Tensor = self.model.lm_head(state)
        return scores.float()


def build_llava(tokenizer: PreTrainedTokenizerFast, clip: CLIPModel) -> LlavaForConditionalGeneration:
    """A LLaVA model with the given vision tower and a fresh projector and decoder."""
    model = LlavaForConditionalGeneration(llava_config(tokenizer, clip))
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower.eval()
    model.model.vision_tower.set_attn_implementation("eager")
    return model


def _attributes(scene: Scene) -> NDArray[np.float32]:
    """Everything worth knowing about each patch as +2 (is so) and -2 (is not), and its place."""
    labels = dense_labels(scene)
    rows, columns = np.divmod(np.arange(VISUAL), GRID)
    on_object = labels.color > 0
    here = np.stack([columns + 0.5, rows + 0.5], axis=1)
    place = np.where(on_object[:, None], here + labels.offset, here) / GRID * 4 - 2
    flags = [labels.color == 1 + c for c in range(len(COLORS))]
    flags += [labels.shape == 1 + c for c in range(len(SHAPES))]
    flags += [labels.size == 1 + c for c in range(len(SIZES))]
    flags += [labels.character == 1 + c for c in range(1 + len(CHARACTERS))]
    flags += [on_object, labels.centre == 1, np.full(VISUAL, scene.background == "dark")]
    flags += [columns * CELLS // GRID == c for c in range(CELLS)]
    flags += [rows * CELLS // GRID == c for c in range(CELLS)]
    flags += [columns == c for c in range(GRID)] + [rows == c for c in range(GRID)]
    table = np.stack(flags, axis=1) * 4.0 - 2.0
    return np.concatenate([table, place, -place], axis=1).astype(np.float32)


@torch.no_grad()
def start_projector(model: LlavaForConditionalGeneration, seed: int, pictures: int = 256) -> None:
    """Start the projector as a read-out of the dense labels, fitted by least squares.

    The visual tokens are then clean codes of colour, shape, size, character and place from the
    first step on; hidden units that are left over read random directions.
    """
    rng = random.Random(f"projector {seed}")
    scenes = [draw_scene(rng) for _ in range(pictures)]
    raw = torch.from_numpy(np.stack([np.asarray(render(s)) for s in scenes]))
    features = (
        torch.cat([visual_features(model, part) for part in torch.split(raw, 32)]).flatten(0, 1).double()
    )
    target = torch.from_numpy(np.stack([_attributes(s) for s in scenes])).flatten(0, 1).double()
    whitening = Whitening(features)
    rows = (features - whitening.mean) @ whitening.inverse
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
    weight = torch.where(target[:, [ON_OBJECT]] > 0, 1.0, 0.25)
    gram = rows.T @ (weight * rows)
    solution = torch.linalg.solve(
        gram + 1e-3 * len(rows) * torch.eye(len(gram), dtype=gram.dtype), rows.T @ (weight * target)
    )
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    nn.init.normal_(first.weight, std=0.3 * WIDTH**-0.5)
    nn.init.zeros_(first.bias)
    first.weight[: target.shape[1]] = solution[:-1].T.float()
    first.bias[: target.shape[1]] = solution[-1].float()
    whitening.leave(first)
    nn.init.orthogonal_(second.weight, gain=4.0)
    nn.init.zeros_(second.bias)


@torch.no_grad()
def start_decoder(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start the decoder so that words look for patches of the same meaning.

    The words for attributes get the directions in which the projector writes those attributes, and
    half of the query heads start as copies of their key heads ("mimetic" initialization), so that
    a word attends to what resembles it and takes over what it finds there.
    """
    language, second = model.model.language_model, model.model.multi_modal_projector.linear_2
    words = [*COLORS, *SHAPES, *SIZES, "", *CHARACTERS, "", "", "dark", *COLUMNS]
    for unit, word in enumerate(words):
        direction = second.weight[:, unit] / second.weight[:, unit].norm()
        for form in (f" {word}", f" {word}s"):
            ids = tokenizer.encode(form, add_special_tokens=False)
            if word and len(ids) == 1:
                language.embed_tokens.weight[ids[0]].mul_(0.5).add_(0.4 * direction)
    config = model.config.text_config
    size = config.hidden_size // config.num_attention_heads
    share = config.num_attention_heads // config.num_key_value_heads
    for layer in language.layers:
        attention = layer.self_attn
        for kv in range(config.num_key_value_heads):
            there = slice(kv * size, (kv + 1) * size)
            query = slice(kv * share * size, (kv * share + 1) * size)
            match = nn.init.orthogonal_(torch.empty(size, WIDTH))
            taken = nn.init.orthogonal_(torch.empty(size, WIDTH))
            attention.k_proj.weight[there] = 1.5 * match
            attention.q_proj.weight[query] = 1.5 * match
            attention.v_proj.weight[there] = taken
            attention.o_proj.weight[:, query] = 0.1 * taken.T


@torch.no_grad()
def visual_features(model: LlavaForConditionalGeneration, raw: Tensor) -> Tensor:
    """The patches as LLaVA reads them: the last layer but one, without the class token."""
    vision = model.model.vision_tower(normalise(raw), output_hidden_states=True)
    features: Tensor = vision.hidden_states[-2][:, 1:]
    return features


def train_decoder(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int,
    size: int = 24,
    save_every: int = 400,
    on_save: Callable[[], None] | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Train projector and decoder with the vision tower frozen."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    decoder = PackedDecoder(model, tokenizer)
    start_projector(model, seed)
    start_decoder(model, tokenizer)
    trained: list[nn.Module] = [model.model.multi_modal_projector, model.model.language_model]
    optimizer = Optimizer(trained, steps, muon_lr=0.008, adam_lr=1.2e-3, fall=0.7)
    sample = Packs(tokenizer, seed, 1, 64)[0].raw
    whitening = Whitening(visual_features(model, sample))
    first = model.model.multi_modal_projector.linear_1
    whitening.enter(first)
    loader = torch.utils.data.DataLoader(
        Packs(tokenizer, seed, steps, size), batch_size=None, num_workers=1, prefetch_factor=8
    )
    started = time.monotonic()
    hits, totals = torch.zeros(2), torch.zeros(2)
    for step, pack in enumerate(loader):
        seen = None
        if step >= steps // 6:
            seen = hide_tokens(pack.owners, len(decoder.language.layers), generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = visual_features(model, pack.raw)
        features = whitening(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            asked, told = decoder(features, [pack.questions, pack.captions], seen)
            answered = pack.question_answers >= 0
            targets = pack.question_answers[answered]
            logits = decoder.logits(asked[answered])
            telling = pack.caption_answers >= 0
            caption_logits = decoder.logits(told[telling])
        loss = F.cross_entropy(logits, targets)
        caption_loss = F.cross_entropy(caption_logits, pack.caption_answers[telling])
        torch.autograd.backward(2 * loss + caption_loss)
        optimizer.step()
        with torch.no_grad():
            right = torch.zeros_like(pack.question_answers, dtype=torch.bool)
            right[answered] = logits.argmax(-1) == targets
            correct = (right | ~answered).all(-1)
            whole = torch.ones(len(correct), dtype=torch.bool) if seen is None else seen[-1].all(-1)
            hits[0] += correct[whole].float().sum()
            totals[0] += correct[whole].numel()
            hits[1] += correct[~whole].float().sum()
            totals[1] += correct[~whole].numel()
        if step % 25 == 0 or step == steps - 1:
            rate = hits / totals.clamp(min=1)
            hits.zero_()
            totals.zero_()
            told_right = (caption_logits.argmax(-1) == pack.caption_answers[telling]).float().mean()
            log(
                f"decoder {step:5d} {time.monotonic() - started:6.0f}s loss {loss.item():.3f} "
                f"caption {caption_loss.item():.3f} {told_right.item():.3f} "
                f"| answers {rate[0].item():.3f}, tokens hidden {rate[1].item():.3f}"
            )
        if on_save is not None and step % save_every == save_every - 1:
            whitening.leave(first)
            on_save()
            whitening.enter(first)
    whitening.leave(first)
