"""Shares of layers, head groups, columns or rows among stages or ranks; what is not given is split evenly."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

Span = tuple[int, int]  # [start, stop)


def complete(counts: Sequence[int | None], total: int, name: str, where: str, least: int) -> list[int]:
    """`counts` with None replaced by even shares, so that the sum is `total` and every share is at least `least`.

    Raises ValueError, with the `name` of what is shared and `where`, if the given counts do not allow that.
    """
    given = [count for count in counts if count is not None]
    if any(count < least for count in given):
        raise ValueError(f"{name} of {where} are {_show(counts)}; every share must be at least {least}.")
    rest, open_places = total - sum(given), len(counts) - len(given)
    if open_places == 0 and rest != 0:
        raise ValueError(f"{name} of {where} are {_show(counts)}, together {sum(given)}, but the model has {total}.")
    if rest < least * open_places:
        raise ValueError(
            f"{name} of {where} are {_show(counts)}, but the model has {total} and every share must be at least "
            f"{least}; lower those that are given."
        )
    fill = iter(even_split(rest, open_places) if open_places else [])
    return [next(fill) if count is None else count for count in counts]


def _show(counts: Sequence[int | None]) -> str:
    return " + ".join("?" if count is None else str(count) for count in counts)


def even_split(total: int, parts: int) -> list[int]:
    """`parts` counts that differ by at most one, larger ones first, with the sum `total`."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def spans(counts: Iterable[int]) -> list[Span]:
    """Consecutive spans of these lengths, from 0."""
    return list(pairwise(accumulate(counts, initial=0)))
