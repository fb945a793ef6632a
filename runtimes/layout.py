"""Where the visual tokens of a sequence lie: the index tensors that the host gives to the site graphs."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from edgeprune import tensor_names as names
from edgeprune.errors import PromptError
from edgeprune.visual_layout import Int64Array, VisualLayout

# Host inputs that are the same at every depth of the decoder: a prompt uploads them once.
PROMPT_INPUTS = (names.GRID_IDS, names.PROMPT_TEXT_ROWS, names.VISUAL_PLACES)


class SiteCounts(Protocol):
    """The numbers of tokens that a site knows beforehand; a bundle's sites and a method's are such."""

    @property
    def keep_per_image(self) -> int | None:
        """Visual tokens that leave the site, merged ones included."""

    @property
    def keep_share(self) -> float | None:
        """The share of a picture's unpruned tokens that leaves the site instead."""

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
        num_visual: Visual tokens among the rows.
        num_prompt_rows: Rows before anything was dropped in the decoder.
        visual: The unpruned visual tokens; None for a prompt without pictures.
    """

    num_rows: int
    num_text_rows: int
    num_visual: int
    num_prompt_rows: int
    visual: VisualLayout | None

    @classmethod
    def from_token_ids(
        cls, token_ids: Int64Array, image_token_id: int, visual: VisualLayout | None
    ) -> "SequenceLayout":
        """Read the layout of a prompt from its ids [S], placeholders included.

        Raises:
            PromptError: There are visual tokens but no text after the last one.
        """
        rows = np.flatnonzero(token_ids == image_token_id)
        num_rows = int(token_ids.shape[0])
        num_text_rows = num_rows - 1 - int(rows[-1]) if rows.size else num_rows
        if rows.size and num_text_rows == 0:
            raise PromptError("the prompt ends with a picture: put the question after the last picture")
        return cls(num_rows, num_text_rows, int(rows.size), num_rows, visual)

    @property
    def num_images(self) -> int:
        """M."""
        return 0 if self.visual is None else self.visual.num_images

    def keep(self, num_rows: int) -> "SequenceLayout":
        """The layout after a site that left ``num_rows`` rows."""
        dropped = self.num_rows - num_rows
        return replace(self, num_rows=num_rows, num_visual=self.num_visual - dropped)

    def visual_tokens_behind(self, site: SiteCounts) -> int | None:
        """Visual tokens that leave a site, merged ones included; None if it depends on what the pictures show."""
        if self.visual is None:
            return 0
        budgets = self._budgets(self.visual, site)
        return None if budgets is None else min(sum(budgets), self.num_visual)

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
        if name == names.PROMPT_TEXT_ROWS:
            return np.arange(self.num_prompt_rows - self.num_text_rows, self.num_prompt_rows, dtype=np.int64)
        if self.visual is not None and name == names.GRID_IDS:
            return np.arange(len(self.visual.grids), dtype=np.int64)
        if self.visual is not None and name == names.VISUAL_PLACES:
            return self.visual.table
        if self.visual is not None and site is not None and name == names.GRID_KEEP:
            budgets = self._budgets(self.visual, site)
            if budgets is not None:
                return self.visual.split_over_grids(budgets)
        if site is not None and name == names.RECYCLED_IDS:
            return np.arange(site.recycled_per_image * self.num_images, dtype=np.int64)
        if site is not None and name == names.MERGED_IDS:
            return np.arange(site.merged_per_image * self.num_images, dtype=np.int64)
        if site is not None and name == names.NUM_KEEP:
            left = self.visual_tokens_behind(site)
            if left is not None:
                return np.array(left - site.merged_per_image * self.num_images, dtype=np.int64)
        raise KeyError(name)

    @staticmethod
    def _budgets(visual: VisualLayout, site: SiteCounts) -> list[int] | None:
        """Visual tokens that a site keeps of each picture; None if it depends on what the pictures show."""
        counts = visual.tokens_per_image
        if site.keep_per_image is not None:
            return [min(site.keep_per_image, count) for count in counts]
        if site.keep_share is not None:
            # The product is rounded first: 0.29 · 100 is 28.999999999999996.
            return [max(1, int(round(count * site.keep_share, 6))) for count in counts]
        return None
