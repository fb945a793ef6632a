"""Runs samples through a bundle, one after the other in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeprune.calib.record import Record, record_sample
from edgeprune.calib.samples import BadSample, Sample
from edgeprune.errors import PictureError, PromptError
from edgeprune.runtimes.session import Session, open_session

Outcome = tuple[Sample, Record | BadSample]


@dataclass(frozen=True)
class Engine:
    """What runs the bundle; arguments of :func:`edgeprune.open_session`.

    Attributes:
        backend: "onnxruntime" or "tensorrt".
        provider: Of ONNX Runtime; None is "cpu".
        threads: Threads of an operator of ONNX Runtime; None lets it choose.
    """

    backend: str = "onnxruntime"
    provider: str | None = None
    threads: int | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it takes a GPU."""
        return self.backend != "onnxruntime" or self.provider not in (None, "cpu")

    def open(self, bundle: Path) -> Session:
        """Open a bundle."""
        return open_session(bundle, backend=self.backend, provider=self.provider, threads=self.threads)


class SampleRunner(Protocol):
    """Runs samples, here or elsewhere; what comes out is the same."""

    @property
    def engine(self) -> Engine:
        """What runs the bundle."""

    def run(self, bundle: Path, samples: Sequence[Sample], max_new_tokens: int) -> Iterator[Outcome]:
        """Run samples in any order; one that cannot be used comes back with the reason.

        Raises:
            BackendError: The bundle cannot be run.
        """


@dataclass(frozen=True)
class LocalRunner:
    """Runs samples in this process, in their order."""

    engine: Engine = Engine()

    def run(self, bundle: Path, samples: Sequence[Sample], max_new_tokens: int) -> Iterator[Outcome]:
        """See :class:`SampleRunner`."""
        with self.engine.open(bundle) as session:
            for sample in samples:
                yield sample, outcome(session, sample, max_new_tokens)


def outcome(session: Session, sample: Sample, max_new_tokens: int) -> Record | BadSample:
    """The record of a sample, or why there is none."""
    try:
        return record_sample(session, sample, max_new_tokens)
    except (PictureError, PromptError) as error:
        return BadSample(sample.number, sample.name, str(error))
