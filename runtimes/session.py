"""A session: an opened bundle that answers questions about pictures."""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, PictureError
from edgeprune.quantization_entry import FP8
from edgeprune.runtimes.answer import Answer
from edgeprune.runtimes.backend import Backend, open_graphs
from edgeprune.runtimes.graph_chain import GraphChain, Stopwatch, TowerOutput
from edgeprune.runtimes.guide import GuideEncoder, GuideInputs
from edgeprune.runtimes.host_pruner import Pruner, check_takes_pruner
from edgeprune.runtimes.incremental_decoder import IncrementalDecoder
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.overlay import draw_overlay
from edgeprune.runtimes.preprocessing import PictureSource, read_picture
from edgeprune.runtimes.preprocessing_kinds import preprocessing_from_json
from edgeprune.runtimes.prompt import EncodedPrompt, PromptEncoder, PromptFormat
from edgeprune.runtimes.sampling import SamplingOptions, StopMatcher, TokenSampler
from edgeprune.runtimes.tensorrt_backend import TensorRtBackend


class Session:
    """Answers questions about pictures with one bundle on one backend.

    Graphs are opened once and shared; every answer has caches of its own, so threads may share a session.

    Attributes:
        bundle: The bundle.
        backend: The backend.
    """

    def __init__(self, bundle: Bundle, backend: Backend, pruner: Pruner | None = None) -> None:
        """Open every graph of the bundle.

        Args:
            bundle: The bundle.
            backend: Runs its graphs.
            pruner: Chooses at the sites that let the host choose.

        Raises:
            BackendError: The backend cannot run a graph.
            BundleError: The bundle's preprocessing or prompt format is unusable.
            PruningError: There is a pruner, and no site that takes one.
        """
        manifest = bundle.manifest
        if pruner is not None:
            check_takes_pruner(manifest)
        self.bundle = bundle
        self.backend = backend
        self.preprocessing = preprocessing_from_json(manifest.preprocessing)
        self.prompts = PromptEncoder(
            PromptFormat.from_json(manifest.prompt),
            bundle.file(manifest.tokenizer),
            built_for=backend.longest_sequence(bundle),
        )
        self._guide: GuideEncoder | None = None
        if manifest.probe is not None and manifest.probe.guide_tokenizer is not None:
            self._guide = GuideEncoder(
                bundle.file(manifest.probe.guide_tokenizer), manifest.probe.guide_context_length
            )
        graphs = open_graphs(bundle, backend)
        self._chain: GraphChain | None = GraphChain(manifest, backend, graphs, pruner)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs; the session cannot answer any more."""
        self._chain = None

    def generate(
        self, images: Sequence[PictureSource], prompt: str, options: SamplingOptions | None = None
    ) -> Iterator[str]:
        """Answer piece by piece, as the tokens come.

        Args:
            images: Pictures (paths, bytes, PIL images, arrays), in the order of the prompt's placeholders.
            prompt: The question; without placeholders the pictures come before it.
            options: Sampling; greedy by default.

        Raises:
            PictureError: A picture is unusable.
            PromptError: The prompt is empty, too long, or its placeholders do not fit the pictures.
            PruningError: The session's pruner keeps nothing, or what is not there.
        """
        yield from self._generate(images, prompt, options or SamplingOptions())

    def answer(
        self,
        images: Sequence[PictureSource],
        prompt: str,
        options: SamplingOptions | None = None,
        *,
        watch: Stopwatch | None = None,
    ) -> Answer:
        """Answer as a whole, with token ids, kept tokens and timings; arguments as :meth:`generate`.

        Args:
            images: Pictures.
            prompt: The question.
            options: Sampling.
            watch: Takes the timings, if something else than their sums is wanted; a new one per answer.
        """
        steps = self._generate(images, prompt, options or SamplingOptions(), watch)
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                answer: Answer = stop.value
                return answer

    def stream(
        self, images: Sequence[PictureSource], prompt: str, options: SamplingOptions | None = None
    ) -> Generator[str, None, Answer]:
        """Like :meth:`generate`; the generator's return value is the :class:`Answer`."""
        return self._generate(images, prompt, options or SamplingOptions())

    def overlay(self, picture: PictureSource, answer: Answer, index: int = 0) -> Image.Image:
        """Draw which tokens of a picture survived each site.

        Args:
            picture: The picture, as it was given.
            answer: The answer about it.
            index: Which of the answer's pictures it is.
        """
        if answer.visual is None:
            raise PictureError("the answer is about no picture: nothing was pruned that could be drawn")
        sites = [(f"{site.name} · {site.place}", site.indices) for site in answer.sites]
        shown = self.preprocessing.to_rgb(read_picture(picture))
        return draw_overlay(shown, answer.visual, index, answer.entering, sites)

    def _generate(
        self,
        images: Sequence[PictureSource],
        prompt: str,
        options: SamplingOptions,
        watch: Stopwatch | None = None,
    ) -> Generator[str, None, Answer]:
        chain = self._chain
        if chain is None:
            raise BackendError("the session is closed: open the bundle again")
        watch = watch or Stopwatch()
        with watch.time("time_to_first_token"):
            # Before the pictures cost anything: is this a prompt?
            self.prompts.render(prompt, len(images))
            tower: TowerOutput | None = None
            if images:
                with watch.time("preprocess"):
                    rows, columns = self.bundle.manifest.geometry.grid
                    read = [read_picture(image) for image in images]
                    pictures = self.preprocessing.prepare(read, (rows, columns))
                tower = chain.encode_pictures(pictures, watch)
            with watch.time("tokenize"):
                per_image = () if tower is None else tower.rows.tokens_per_image
                encoded, guide = self._encode(prompt, per_image, options.max_new_tokens)
            logits, sequence = chain.prefill(encoded.token_ids, tower, guide, options.max_new_tokens, watch)
            sampler = TokenSampler(options)
            token = sampler(logits)
        detokenizer = IncrementalDecoder(self.prompts.tokenizer)
        stops = StopMatcher(options.stop)
        eos = () if options.ignore_eos else self.prompts.format.eos_token_ids
        watch.milliseconds["decode"] = 0.0
        tokens: list[int] = []
        pieces: list[str] = []
        reason, decode_steps = "length", 0
        while True:
            if token in eos:
                reason = "end"
                break
            tokens.append(token)
            piece, stopped = stops.push(detokenizer.push(token))
            if piece:
                pieces.append(piece)
                yield piece
            if stopped:
                reason = "stop"
                break
            if len(tokens) == options.max_new_tokens:
                break
            with watch.time("decode"):
                token = sampler(chain.decode(token, sequence, watch))
            decode_steps += 1
        if reason != "stop":
            piece, stopped = stops.push(detokenizer.finish())
            piece += "" if stopped else stops.finish()
            reason = "stop" if stopped else reason
            if piece:
                pieces.append(piece)
                yield piece
        # What happens between two pieces is the caller's time.
        watch.milliseconds["total"] = watch.milliseconds["time_to_first_token"] + watch.milliseconds["decode"]
        return Answer(
            text="".join(pieces),
            token_ids=tuple(tokens),
            finish_reason=reason,
            prompt_tokens=int(encoded.token_ids.shape[0]),
            sites=chain.site_reports(sequence),
            timings_ms=watch.milliseconds,
            decode_steps=decode_steps,
            visual=None if tower is None else tower.layout,
            entering=() if tower is None else chain.entering_slots(tower),
        )

    def _encode(
        self, prompt: str, tokens_per_image: Sequence[int], max_new_tokens: int
    ) -> tuple[EncodedPrompt, GuideInputs | None]:
        encoded = self.prompts.encode_chat(prompt, tokens_per_image, max_new_tokens=max_new_tokens)
        if self._guide is None or not tokens_per_image:
            return encoded, None
        return encoded, self._guide.encode(encoded.tail_text, encoded.tail_offsets)


BACKENDS = ("onnxruntime", "tensorrt")


def open_session(
    bundle: str | Path,
    *,
    backend: str = "onnxruntime",
    provider: str | None = None,
    threads: int | None = None,
    pruner: Pruner | None = None,
) -> Session:
    """Open a bundle to answer questions.

    Args:
        bundle: The folder.
        backend: "onnxruntime", or "tensorrt" for the engines that were built into the bundle.
        provider: Of ONNX Runtime: "cpu", "cuda", "tensorrt" or "tensorrt_rtx"; None is "cpu".
        threads: Threads of an operator of ONNX Runtime; None lets it choose.
        pruner: Chooses the visual tokens that stay at the sites of the method "host", instead of the bundle itself
            (:mod:`edgeprune.runtimes.host_pruner`). What it raises, the answer raises.

    Raises:
        BundleError: No bundle, or a file is missing or changed.
        BackendError: The backend cannot run here.
        PruningError: There is a pruner, and no site of the bundle takes one.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend '{backend}' is unknown, known: {', '.join(BACKENDS)}")
    opened = Bundle.open(bundle)
    if backend == "onnxruntime":
        quantization = opened.manifest.quantization
        fuse_qdq = quantization is None or FP8 not in quantization.precisions
        return Session(opened, OnnxRuntimeBackend(provider or "cpu", threads, fuse_qdq=fuse_qdq), pruner)
    for option, value in (("provider", provider), ("threads", threads)):
        if value is not None:
            raise BackendError(
                f"--{option} is of ONNX Runtime: leave it away, or run with --backend onnxruntime"
            )
    return Session(opened, TensorRtBackend(), pruner)
