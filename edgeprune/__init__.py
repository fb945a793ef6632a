"""Vision-language models with in-network visual-token pruning, from checkpoint to engine.

``open_session`` runs a bundle and needs neither torch nor transformers; ``edgeprune.export.export`` makes one.
"""

__version__ = "0.1.0"

from edgeprune.runtimes.answer import Answer as Answer
from edgeprune.runtimes.host_pruner import Pruner as Pruner
from edgeprune.runtimes.host_pruner import SiteScores as SiteScores
from edgeprune.runtimes.sampling import SamplingOptions as SamplingOptions
from edgeprune.runtimes.session import Session as Session
from edgeprune.runtimes.session import open_session as open_session
