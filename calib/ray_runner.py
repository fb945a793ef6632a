"""Runs samples on the workers of a Ray cluster: several processes here, or several machines.

Records do not depend on each other, so they are the same wherever and in whatever order samples are run. A worker that
dies is started again by Ray and its samples are run again; records that have come back are in the journal.
"""

import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.calib.record import Record
from edgeprune.calib.runner import Engine, Outcome, outcome
from edgeprune.calib.samples import BadSample, Sample
from edgeprune.errors import BackendError, DataError
from edgeprune.extras import require
from edgeprune.json_data import from_json, to_json

LOCAL = "local"
# Small, so that little is run again when a worker dies.
_SAMPLES_PER_BLOCK = 4
_RETRIES = 4
_CONNECT_SECONDS = 10


@dataclass(frozen=True)
class RayRunner:
    """Runs samples with Ray Data, in the order in which workers get them done.

    Bundle and pictures must lie at the same paths on every machine, and the same edgeprune must be installed there.

    Attributes:
        engine: What runs the bundle on a worker; with no threads given, a worker has one.
        address: Of a cluster ("auto", "ray://host:10001"), or "local" for processes of this machine.
        workers: How many; None is as many as the cluster has cores, with "cuda" as many as it has GPUs.
    """

    engine: Engine
    address: str = LOCAL
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise DataError(f"--workers is {self.workers}: give at least 1")

    def run(self, bundle: Path, samples: Sequence[Sample], max_new_tokens: int) -> Iterator[Outcome]:
        """See :class:`edgeprune.calib.runner.SampleRunner`.

        Raises:
            MissingExtraError: Ray is not installed.
            BackendError: There is no cluster at the address, or its workers cannot run the bundle.
        """
        # Ray reports how it is used unless it is told not to, and logs what Ray Data does as an error of its own.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray = require("ray", extra="ray", purpose="for --ray")
        data = require("ray.data", extra="ray", purpose="for --ray")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        self._connect(ray)
        try:
            yield from self._run(ray, data, bundle, samples, max_new_tokens)
        except ray.exceptions.RayError as error:
            raise BackendError(
                f"Ray could not run the samples ({_cause(error)}): check its machines; what is done stays done"
            ) from error
        finally:
            ray.shutdown()

    def _connect(self, ray: Any) -> None:
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        try:
            # Ray itself tries for many minutes.
            if host and port.isdigit():
                socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise BackendError(
                f"nothing answers at {self.address} ({error}): start a Ray cluster, or give --ray local"
            ) from error
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address == LOCAL:
                ray.init(address=LOCAL, include_dashboard=False, num_cpus=self._cores(), **quiet)
            else:
                ray.init(address=self.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BackendError(
                f"there is no Ray cluster at {self.address} ({_first_line(error)}): start one, or give --ray local"
            ) from error

    def _cores(self) -> int:
        """Of a cluster of processes: what the workers ask for and one for Ray's own."""
        threads = self.engine.threads or 1
        workers = self.workers or max(1, (os.cpu_count() or 1) // threads)
        return workers * threads + 1

    def _run(
        self, ray: Any, data: Any, bundle: Path, samples: Sequence[Sample], max_new_tokens: int
    ) -> Iterator[Outcome]:
        threads = self.engine.threads or 1
        # Workers share a machine; a GPU's backend takes no threads.
        engine = self.engine if self.engine.on_gpu else replace(self.engine, threads=threads)
        on_gpu = engine.on_gpu
        resources = ray.cluster_resources()
        room = int(resources.get("GPU", 0)) if on_gpu else int(resources.get("CPU", 1)) // threads
        workers = min(self.workers or max(1, room), len(samples))
        data.DataContext.get_current().enable_progress_bars = False
        rows = [
            {
                "index": index,
                "pictures": [str(path.absolute()) for path in sample.pictures],
                "prompt": sample.prompt,
            }
            for index, sample in enumerate(samples)
        ]
        blocks = -(-len(rows) // _SAMPLES_PER_BLOCK)
        with warnings.catch_warnings():
            # The retries have no other name yet (Ray 2.60).
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            done = data.from_items(rows, override_num_blocks=blocks).map(
                _Worker,
                fn_constructor_args=(str(bundle.absolute()), engine, max_new_tokens),
                compute=data.ActorPoolStrategy(size=workers),
                num_cpus=threads,
                num_gpus=1 if on_gpu else 0,
                # A worker that is killed is replaced; a sample that ends every worker is not tried for ever.
                max_restarts=-1,
                max_task_retries=_RETRIES,
            )
        for row in done.iter_rows():
            sample = samples[int(row["index"])]
            record = row["record"]
            if record:
                yield sample, from_json(Record, json.loads(record), "a record")
            else:
                yield sample, BadSample(sample.number, sample.name, row["reason"])


class _Worker:
    """Runs samples in a process of Ray's with one open bundle.

    Args:
        bundle: The folder.
        engine: What runs it.
        max_new_tokens: Most tokens to generate.
    """

    def __init__(self, bundle: str, engine: Engine, max_new_tokens: int) -> None:
        self._session = engine.open(Path(bundle))
        self._max_new_tokens = max_new_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run one sample: JSON of its record, or the reason why there is none."""
        index = int(row["index"])
        sample = Sample(index, "", tuple(Path(path) for path in row["pictures"]), row["prompt"])
        found = outcome(self._session, sample, self._max_new_tokens)
        if isinstance(found, BadSample):
            return {"index": index, "record": "", "reason": found.reason}
        return {"index": index, "record": json.dumps(to_json(found)), "reason": ""}


def _cause(error: BaseException) -> str:
    """The first line of the error at the bottom of Ray's wrappings."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
