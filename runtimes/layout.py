"""Where the visual tokens of a sequence lie: the index tensors that the host gives to the site graphs."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune import tensor_names as names
from edgeprune.errors import PromptError

Int64Array = NDArray[np.int64]


class SiteCounts(Protocol):
    """The numbers of tokens that a site knows beforehand; a bundle's sites and a method's are such."""

    @property
    def keep_per_image(self) -> int | None:
        """Visual tokens that leave the site, merged ones included."""

    @property
    def recycled_per_image(self) -> int:
        """Dropped tokens that are looked through for merging."""

    @property
    def merged_per_image(self) -> int:
        """Tokens that they are merged into."""


@dataclass(frozen=True)
class SequenceLayout:
    """Rows of one sequence at some depth of the decoder.

    Text is never dropped, so the rows after the last visual token stay the last rows at every depth.

    Attributes:
        num_rows: S.
        num_text_rows: T, rows after the last visual token.
        num_images: M.
        num_visual: Visual tokens among the rows.
        num_prompt_rows: Rows before anything was dropped.
    """

    num_rows: int
    num_text_rows: int
    num_images: int
    num_visual: int
    num_prompt_rows: int

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
        return cls(num_rows, num_text_rows, num_images, int(visual.size), num_rows)

    def keep(self, num_rows: int) -> "SequenceLayout":
        """The layout after a site that left ``num_rows`` rows."""
        dropped = self.num_rows - num_rows
        return replace(self, num_rows=num_rows, num_visual=self.num_visual - dropped)

    def host_input(self, name: str, site: SiteCounts | None = None) -> Int64Array:
        """An index tensor by name (:mod:`edgeprune.tensor_names`).

        Args:
            name: The tensor.
            site: The site that it is for, where the tensor depends on one.

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
        if name == names.PROMPT_TEXT_ROWS:
            return np.arange(self.num_prompt_rows - self.num_text_rows, self.num_prompt_rows, dtype=np.int64)
        if site is not None and name == names.RECYCLED_IDS:
            return np.arange(site.recycled_per_image * self.num_images, dtype=np.int64)
        if site is not None and name == names.MERGED_IDS:
            return np.arange(site.merged_per_image * self.num_images, dtype=np.int64)
        if site is not None and name == names.NUM_KEEP and site.keep_per_image is not None:
            chosen = site.keep_per_image - site.merged_per_image
            return np.array(chosen * self.num_images, dtype=np.int64)
        raise KeyError(name)
