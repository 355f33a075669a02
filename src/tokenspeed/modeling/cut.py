"""Where a dimension may be cut, when ranks divide it."""

from dataclasses import dataclass

from tokenspeed.core.errors import ConfigError
from tokenspeed.distributed import share

__all__ = ["Cut", "Division"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """One rank's part in the division of a dimension.

    Attributes:
        shards: over how many ranks.
        index: which of them.
    """

    shards: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The smallest pieces of a dimension, and what must stay together.

    Ranks get whole groups, the first ranks one more each where they do not come out even. Where
    there are more ranks than groups, as with few KV heads, several ranks share a group: each gets
    its share of the group's units, or, of a part named in `shared`, all of them.

    Attributes:
        unit: elements that are never parted: a head, a block of quantised weights.
        groups: how many equal groups of units there are; None for one of each unit.
        shared: parts that ranks of one group hold in common.
    """

    unit: int = 1
    groups: int | None = None
    shared: frozenset[str] = frozenset()

    def spans(
        self, size: int, shards: int, *, what: str, part: str | None = None
    ) -> tuple[tuple[int, int], ...]:
        """First and end element of each rank.

        Args:
            size: elements of the dimension, or of the part.
            shards: ranks that divide it.
            what: names the dimension in errors.
            part: which part it is, of a stacked dimension.

        Raises:
            ConfigError: there are not enough pieces, or they do not come out even where they must.
        """
        units, rest = divmod(size, self.unit)
        groups = units if self.groups is None else self.groups
        if rest or units % groups:
            raise ConfigError(f"{what} is {size}, which is no multiple of its unit, {self.unit}")
        if shards <= groups:
            each = size // groups
            found = [share(groups, shards, index) for index in range(shards)]
            return tuple((first * each, end * each) for first, end in found)
        sharers, uneven = divmod(shards, groups)
        if self.groups is None or uneven:
            raise ConfigError(
                f"{shards} ranks cannot divide {what}, of {groups} pieces; at most {groups} can"
                + ("" if self.groups is None else f", or a multiple of {groups}")
            )
        in_group, alike = units // groups, part in self.shared
        if not alike and in_group % sharers:
            raise ConfigError(
                f"{shards} ranks cannot divide {what}: {sharers} of them would share each of "
                f"{groups} groups of {in_group}"
            )
        pieces = groups if alike else shards
        each = size // pieces
        held = [index // sharers if alike else index for index in range(shards)]
        return tuple((index * each, (index + 1) * each) for index in held)
