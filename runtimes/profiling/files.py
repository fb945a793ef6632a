"""Files that a profile is written to."""

import json
from pathlib import Path

from edgeprune.errors import ProfileError
from edgeprune.runtimes.profiling.html_page import render_page
from edgeprune.runtimes.profiling.profiler import Profile
from edgeprune.runtimes.profiling.trace import trace_events
from edgeprune.whole_file import write_whole


def check_output(path: Path) -> None:
    """Find out before measuring what would keep a file from being written.

    Raises:
        ProfileError: It is a folder, or its folder does not exist.
    """
    if path.is_dir() or not path.parent.is_dir():
        wrong = f"{path} is a folder" if path.is_dir() else f"{path.parent} is no folder"
        raise ProfileError(f"{path} cannot be written ({wrong}): choose a file in a folder that exists")


def write_page(profile: Profile, path: Path) -> None:
    """One HTML file that needs no other.

    Raises:
        ProfileError: It cannot be written.
    """
    _write(render_page(profile.report, profile.overlays), path)


def write_trace(profile: Profile, path: Path) -> None:
    """All spans of all runs, in the Trace Event format that Perfetto and Chrome open.

    Raises:
        ProfileError: It cannot be written.
    """
    names = [bundle.name for bundle in profile.report.bundles]
    _write(json.dumps({"traceEvents": trace_events(names, profile.runs), "displayTimeUnit": "ms"}), path)


def _write(text: str, path: Path) -> None:
    check_output(path)
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise ProfileError(
            f"{path} cannot be written ({error}): free disk space or choose a folder that is writable"
        ) from error
