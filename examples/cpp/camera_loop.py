"""Keeps one session and answers the same question about frame after frame, always the newest.

Frames that come while an answer is made are dropped; one line per answered frame. The picture stands for the camera:

``python examples/cpp/camera_loop.py BUNDLE PICTURE QUESTION [FRAMES_PER_SECOND [FRAMES]]``
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import edgeprune


@dataclass(frozen=True)
class Frame:
    """A picture with its number and when it was taken."""

    number: int
    taken: float
    picture: Image.Image


class LatestFrame:
    """Room for one frame: a newer one takes the place of one that nobody has fetched."""

    def __init__(self) -> None:
        self._frames: queue.Queue[Frame | None] = queue.Queue(maxsize=1)
        self.dropped = 0

    def put(self, frame: Frame | None) -> None:
        """Give the newest frame; None when there will be no more."""
        # The last frame is answered before the loop ends.
        while frame is not None:
            try:
                self._frames.put_nowait(frame)
            except queue.Full:
                try:
                    self._frames.get_nowait()
                    self.dropped += 1
                except queue.Empty:
                    pass
                continue
            return
        self._frames.put(None)

    def take(self) -> Frame | None:
        """Wait for a frame."""
        return self._frames.get()


def film(latest: LatestFrame, path: Path, rate: float, frames: int) -> None:
    """Take frames at a fixed rate."""
    try:
        for number in range(frames):
            with Image.open(path) as picture:
                latest.put(Frame(number, time.perf_counter(), picture.convert("RGB")))
            time.sleep(1 / rate)
    finally:
        latest.put(None)


def main() -> None:
    """The command line."""
    if len(sys.argv) < 4:
        sys.exit("usage: camera_loop.py BUNDLE PICTURE QUESTION [FRAMES_PER_SECOND [FRAMES]]")
    bundle, path, question = sys.argv[1:4]
    rate = float(sys.argv[4]) if len(sys.argv) > 4 else 10.0
    frames = int(sys.argv[5]) if len(sys.argv) > 5 else 50
    options = edgeprune.SamplingOptions(max_new_tokens=16)
    latest = LatestFrame()
    with edgeprune.open_session(bundle) as session:
        camera = threading.Thread(target=film, args=(latest, Path(path), rate, frames), daemon=True)
        camera.start()
        while (frame := latest.take()) is not None:
            answer = session.answer([frame.picture], question, options)
            age = 1000 * (time.perf_counter() - frame.taken)
            times = answer.timings_ms
            print(
                f"frame {frame.number}: first token {times['time_to_first_token']:.1f} ms, "
                f"answer {times['total']:.1f} ms, since the frame {age:.1f} ms, "
                f"{latest.dropped} dropped so far:{answer.text}",
                flush=True,
            )


if __name__ == "__main__":
    main()
