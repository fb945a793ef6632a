"""Where the visual tokens of a sequence lie: the index tensors that the host gives to the site graphs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune import tensor_names as names
from edgeprune.errors import PromptError

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class SequenceLayout:
    """Rows of one sequence at some depth of the decoder.

    Text is never dropped, so the rows after the last visual token stay the last rows at every depth.

    Attributes:
        num_rows: S.
        num_text_rows: T, rows after the last visual token.
        num_images: M.
        num_visual: Visual tokens among the rows.
    """

    num_rows: int
    num_text_rows: int
    num_images: int
    num_visual: int

    @classmethod
    def from_token_ids(cls, token_ids: Int64Array, image_token_id: int, num_images: int) -> "SequenceLayout":
        """Read the layout of an unpruned sequence from its ids [S].

        Raises:
            PromptError: There are visual tokens but no text after the last one.
        """
        visual = np.flatnonzero(token_ids == image_token_id)
        num_rows = int(token_ids.shape[0])
        num_text_rows = num_rows - 1 - int(visual[-1]) if visual.size else num_rows
        if visual.size and num_text_rows == 0:
            raise PromptError("the prompt ends with a picture: put the question after the last picture")
        return cls(num_rows, num_text_rows, num_images, int(visual.size))

    def keep(self, num_rows: int) -> "SequenceLayout":
        """The layout after a site that left ``num_rows`` rows."""
        dropped = self.num_rows - num_rows
        return SequenceLayout(num_rows, self.num_text_rows, self.num_images, self.num_visual - dropped)

    def host_input(self, name: str, keep_per_image: int | None = None) -> Int64Array:
        """An index tensor by name (:mod:`edgeprune.tensor_names`).

        Raises:
            KeyError: The host does not give a tensor of that name.
        """
        first_text = self.num_rows - self.num_text_rows
        if name == names.TEXT_ROWS:
            return np.arange(first_text, self.num_rows, dtype=np.int64)
        if name == names.CONTEXT_ROWS:
            return np.arange(first_text, dtype=np.int64)
        if name == names.IMAGE_IDS:
            return np.arange(self.num_images, dtype=np.int64)
        if name == names.NUM_KEEP and keep_per_image is not None:
            return np.array(keep_per_image * self.num_images, dtype=np.int64)
        raise KeyError(name)
