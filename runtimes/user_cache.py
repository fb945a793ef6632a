"""Where things lie that can be made again and belong to no bundle."""

import os
from pathlib import Path


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/edgeprune`` or ``~/.cache/edgeprune``; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "edgeprune"
