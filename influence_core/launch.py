"""How this process was started: alone, or by torchrun as one of several."""

import os
import sys
from dataclasses import dataclass

from influence_core.errors import UserError

_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """The place of a process among those that were started with it."""

    rank: int = 0
    local_rank: int = 0  # on its machine
    world_size: int = 1

    @classmethod
    def here(cls) -> "Launch":
        """As the environment says.

        Raises:
            UserError: it says a part of it, or nonsense.
        """
        given = {name: os.environ[name] for name in _SET_BY_TORCHRUN if name in os.environ}
        if not given:
            return cls()
        missing = [name for name in (*_SET_BY_TORCHRUN, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"{next(iter(given))} is set in the environment and {missing[0]} is not: start several processes with "
                f"torchrun, which sets both, or unset {' '.join(given)} to run one"
            )
        if not all(value.isdecimal() for value in given.values()) or not (
            int(given["RANK"]) < int(given["WORLD_SIZE"]) and int(given["LOCAL_RANK"]) < int(given["WORLD_SIZE"])
        ):
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(f"{said} in the environment is nothing that torchrun sets: unset them to run one process")
        return cls(int(given["RANK"]), int(given["LOCAL_RANK"]), int(given["WORLD_SIZE"]))

    @classmethod
    def require_torchrun(cls, flag: str) -> None:
        """Raise UserError where a flag that is for several processes was given to one."""
        if cls.here() == cls() and "RANK" not in os.environ:
            raise UserError(
                f"{flag} works under torchrun only: torchrun --standalone --nproc-per-node=N "
                f"{sys.argv[0]} {flag} …, or leave {flag} out for one process"
            )
