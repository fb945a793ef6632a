"""Where things lie that can be made again and belong to no bundle."""

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/edgeprune`` or ``~/.cache/edgeprune``, without a home the system's temporary folder.

    It need not exist.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:
        root = Path(tempfile.gettempdir())
    return root / "edgeprune"
