"""Importing ONNX Runtime, without its telemetry."""

import os
from types import ModuleType

from edgeprune.extras import require


def onnxruntime_module(*, extra: str, purpose: str) -> ModuleType:
    """Import onnxruntime, which must not report on what is run here.

    Its packages since 1.31 collect events in a file below ~/.cache and send them, on Linux, too, unless the variable
    ORT_DISABLE_TELEMETRY is set when they are loaded. A value that the user gave it stays.

    Args:
        extra: The extra of edgeprune that installs it.
        purpose: What it is needed for; completes the sentence "… is needed …".

    Raises:
        MissingExtraError: It is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return require("onnxruntime", extra=extra, purpose=purpose)
