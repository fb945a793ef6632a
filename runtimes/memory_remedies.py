"""What would make engines fit a device that is too small for them, each with what it saves."""

from dataclasses import replace

from edgeprune.errors import EngineError
from edgeprune.inspection import BYTES_PER_VALUE, TEXT_TOKENS
from edgeprune.runtimes.engine_memory import MemoryModel, gib
from edgeprune.runtimes.engine_precision import bundle_precision
from edgeprune.targets import Target

# Two weights per byte, and a scale for every block of them.
_INT4_BYTES, _INT4_BLOCK = 0.5, 128
# A sequence is not shortened by less.
_SEQUENCE_STEP = 64


def check_fits(model: MemoryModel, target: Target, usable: int) -> None:
    """Refuse what the target cannot hold.

    Args:
        model: What memory depends on.
        target: The device.
        usable: What engines may use of its memory, in bytes.

    Raises:
        EngineError: It does not fit; the message says by how much, what would help and how much each saves.
    """
    need = model.estimate()
    missing = need.run - usable
    if missing <= 0:
        return
    saved = [
        (text, need.run - smaller.estimate().run)
        for text, smaller in (
            _shorter(model, usable),
            _fewer_images(model),
            _one_profile(model),
            _half(model),
            _int4(model),
        )
        if smaller is not None
    ]
    help_ = [
        f"{text} ({gib(less)} less{', enough' if less >= missing else ''})"
        for text, less in saved
        if less >= 0.005 * need.run
    ]
    raise EngineError(
        f"engines would need about {gib(need.run)} to run (weights {gib(need.weights)}, KV cache "
        f"{gib(need.kv_cache)}, activations {gib(need.activations)}), {target.title} has {gib(usable)} to give, "
        f"{gib(missing)} too little: what helps is {', '.join((*help_, 'a smaller model or a larger device'))}"
    )


def _shorter(model: MemoryModel, usable: int) -> tuple[str, MemoryModel | None]:
    """The longest sequence that fits, or the shortest that still holds a picture and a question."""
    limits, geometry = model.limits, model.manifest.geometry
    shortest = geometry.tokens_per_image + TEXT_TOKENS
    steps = range(limits.sequence - _SEQUENCE_STEP, shortest, -_SEQUENCE_STEP)
    smaller = None
    for rows in (*steps, shortest):
        if rows >= limits.sequence:
            break
        images = min(limits.images, max(1, rows // geometry.tokens_per_image))
        smaller = replace(model, limits=replace(limits, sequence=rows, images=images))
        if smaller.estimate().run <= usable:
            break
    return ("" if smaller is None else f"--max-sequence {smaller.limits.sequence}"), smaller


def _fewer_images(model: MemoryModel) -> tuple[str, MemoryModel | None]:
    if model.limits.images == 1:
        return "", None
    return "--max-images 1", replace(model, limits=replace(model.limits, images=1))


def _one_profile(model: MemoryModel) -> tuple[str, MemoryModel | None]:
    return "--profiles one", replace(model, copies={})


def _half(model: MemoryModel) -> tuple[str, MemoryModel | None]:
    if bundle_precision(model.manifest).plain != "fp32":
        return "", None
    half = BYTES_PER_VALUE["float16"]
    weights = {name: size * half // model.bytes_per_value for name, size in model.weights.items()}
    return "export with --dtype float16", replace(model, weights=weights, bytes_per_value=half)


def _int4(model: MemoryModel) -> tuple[str, MemoryModel | None]:
    own = bundle_precision(model.manifest)
    if own.decoder != own.plain:
        return "", None
    share = (_INT4_BYTES + model.bytes_per_value / _INT4_BLOCK) / model.bytes_per_value
    segments = {segment.graph for segment in model.manifest.segments}
    weights = {name: int(size * share) if name in segments else size for name, size in model.weights.items()}
    return "int4 weights in the decoder", replace(model, weights=weights)
