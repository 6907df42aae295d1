"""The examples of a split in order, each read and seen to decode, by many threads."""

import collections
import concurrent.futures
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from beit_jax.data.collection import Item, Part, Sample
from beit_jax.data.decode import BadImage, read_pixels
from beit_jax.errors import UserError

_AHEAD = 4  # examples in flight for each thread: a data set of any size streams through


class Place(NamedTuple):
    """Where a split goes on: after so many examples of a part."""

    part: int
    item: int


START = Place(0, 0)


class Checked(NamedTuple):
    """An example, or why it cannot be used."""

    place: Place  # behind it
    label: int
    example: bytes  # serialised; empty where it cannot be used
    bad: str  # "name<tab>reason" where it cannot be used


def checked(parts: Sequence[Part], start: Place, workers: int) -> Iterator[Checked]:
    """Yields the examples from a place on.

    Raises:
        UserError: a part is damaged, or has not as many examples as its metadata say.
    """
    listed = _listed(parts, start)
    waiting: collections.deque[tuple[Place, concurrent.futures.Future]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while True:
            for place, item in itertools.islice(listed, _AHEAD * workers - len(waiting)):
                waiting.append((place, pool.submit(_read, item)))
            if not waiting:
                return
            place, future = waiting.popleft()
            sample, bad = future.result()
            yield Checked(place, sample.label, sample.example, bad)


def _listed(parts: Sequence[Part], start: Place) -> Iterator[tuple[Place, Item]]:
    for number in range(start.part, len(parts)):
        part = parts[number]
        count = 0
        for count, item in enumerate(part.items(), 1):
            if number > start.part or count > start.item:
                yield Place(number, count), item
        if part.length not in (None, count):
            raise UserError(
                f"{part.name} has {count:,} examples where its metadata say {part.length:,}: "
                "fetch it again."
            )


def _read(item: Item) -> tuple[Sample, str]:
    try:
        sample = item.read()
        read_pixels(sample.image)
        return sample, ""
    except (BadImage, OSError) as error:
        reason = " ".join(str(error).split())
        return Sample(b"", -1, b""), f"{' '.join(item.name.split())}\t{reason}"
