"""Find out which processes share a server (Sec. 4), by the names of their hosts."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch.distributed as dist


def host_name() -> str:
    return platform.node()


@dataclass(frozen=True)
class Placement:
    """The ranks on each server, ascending, with servers sorted by lowest rank. A server's ranks may have gaps."""

    servers: tuple[tuple[int, ...], ...]

    @classmethod
    def gather(cls) -> Placement:
        """Find out where each process runs. All processes must call this."""
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, host_name())
        ranks = {
            name: tuple(rank for rank, other in enumerate(names) if other == name) for name in dict.fromkeys(names)
        }
        return cls(tuple(ranks.values()))

    @property
    def sizes(self) -> list[int]:
        return [len(ranks) for ranks in self.servers]

    @property
    def in_blocks(self) -> bool:
        """Whether each server has consecutive ranks, as with every launcher except Slurm's cyclic distribution."""
        return [rank for ranks in self.servers for rank in ranks] == list(range(sum(self.sizes)))

    def of(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ranks of this rank's server, and the ranks at the same place in all servers (of equal size)."""
        inside = next(ranks for ranks in self.servers if rank in ranks)
        place = inside.index(rank)
        return inside, tuple(ranks[place] for ranks in self.servers)
