"""How many visual tokens a training aims at."""

from dataclasses import dataclass

from edgeprune.errors import PruningError


@dataclass(frozen=True)
class TokenTarget:
    """N_target: visual tokens of a prompt, averaged over the decoder's layers.

    Attributes:
        value: A number of tokens, or a share of the unpruned ones (0 to 1).
        is_share: Which of the two.
    """

    value: float
    is_share: bool = False

    def __post_init__(self) -> None:
        highest = 1.0 if self.is_share else float("inf")
        if not 0 < self.value < highest:
            told = f"{100 * self.value:g} %" if self.is_share else f"{self.value:g} tokens"
            allowed = "more than 0 and less than 100 %" if self.is_share else "more than 0 tokens"
            raise PruningError(f"a target of {told} is out of range, allowed: {allowed}")

    @classmethod
    def parse(cls, text: str) -> "TokenTarget":
        """Read "144" or "25%".

        Raises:
            PruningError: It is neither.
        """
        number = text.strip().removesuffix("%").strip()
        try:
            value = float(number)
        except ValueError as error:
            raise PruningError(
                f"a target of '{text}' is no number: write tokens, as 144, or a share, as 25%"
            ) from error
        is_share = text.strip().endswith("%")
        return cls(value / 100 if is_share else value, is_share)

    def tokens(self, unpruned: float) -> float:
        """The target in tokens, for prompts with so many visual tokens."""
        return self.value * unpruned if self.is_share else self.value


def check_reachable(name: str, target: float, lowest: float, unpruned: float, remedy: str) -> None:
    """Refuse a target that no weights of a method reach.

    Args:
        name: The method.
        target: Tokens.
        lowest: The fewest that it leaves, averaged over the layers.
        unpruned: Tokens before pruning.
        remedy: What would let it leave fewer.

    Raises:
        PruningError: With the range.
    """
    if not lowest < target < unpruned:
        way = f", or {remedy}" if target <= lowest else ""
        raise PruningError(
            f"{name}: a target of {target:g} visual tokens is out of reach, these parameters allow more than "
            f"{lowest:.1f} and less than {unpruned:g}: choose one between{way}"
        )
