"""The errors that edgeprune raises on purpose.

Every message is one line that names the cause and the remedy; the command line prints it without a traceback
and exits with code 1.
"""


class EdgepruneError(Exception):
    """Base of all errors that a user can mend."""


class MissingExtraError(EdgepruneError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class CheckpointError(EdgepruneError):
    """A checkpoint is missing, truncated, of an unknown family, or does not fit its own config."""


class PruningError(EdgepruneError):
    """A pruning method is unknown, does not fit the model, or a pruner's choice does not fit what is there."""


class BundleError(EdgepruneError):
    """A bundle is missing, damaged, or written in a format that this version does not read."""


class ParityError(EdgepruneError):
    """An exported graph does not compute what the torch reference computes."""


class PictureError(EdgepruneError):
    """An input is not a usable picture."""


class PromptError(EdgepruneError):
    """A prompt cannot be answered: wrong number of pictures, no text, or too long for the context."""


class BackendError(EdgepruneError):
    """A runtime backend or execution provider cannot run here."""


class TargetError(EdgepruneError):
    """A target is unknown or lacks what is asked of it."""


class EngineError(EdgepruneError):
    """Engines cannot be built: no TensorRT, a graph that it refuses, profiles that do not fit, too little memory."""


class ProfileError(EdgepruneError):
    """A profile cannot be measured as asked, or not be written."""


class DataError(EdgepruneError):
    """Calibration data is missing, unreadable, of another modality, or too little for what is asked of it."""


class QuantizationError(EdgepruneError):
    """A bundle cannot be quantized as asked: no such precision there, unusable weights, ranges or samples."""
