"""The processes that share the work of a command, started by `accelerate launch`; usually there is one."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from cisformer.runtime.files import make_folder

T = TypeVar("T")
logger = logging.getLogger(__name__)
LONGEST_WAIT = timedelta(days=7)
"""Maximum time that processes wait for each other: one may work for hours, but torch's default is minutes."""


def is_main_process() -> bool:
    """Return whether this process prints messages: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Processes:
    """Number of processes, rank of this one, and its device.

    Attributes
    ----------
    rank, size
        This process's number, from 0, and the number of processes.
    device
        What Accelerate gave this process, such as "cuda:1"; `None` where one process may choose for itself.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None

    @classmethod
    def current(cls, *, cpu: bool = False) -> Processes:
        """Return this process and how many there are; the first call connects them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)
        if state.is_main_process:
            logger.info("%d processes share the work", state.num_processes)
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes results and messages."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def _agree(self, value: T) -> T:
        """Return the value of the first process in every process."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        sent: list[T] = broadcast_object_list([value])
        return sent[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of `items`: consecutive ones, in the order of the processes."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def balance(self, work: Mapping[str, int]) -> list[str]:
        """Return this process's jobs: the largest first, each given to the process with the least work so far."""
        load = [0] * self.size
        mine = []
        for name in sorted(work, key=lambda name: (-work[name], name)):
            rank = load.index(min(load))
            load[rank] += work[name]
            if rank == self.rank:
                mine.append(name)
        return mine

    @contextlib.contextmanager
    def scratch(self, output: Path) -> Iterator[Path]:
        """Yield an empty folder beside `output`, the same for all processes; it is removed at the end."""
        folder = self._agree(output.with_name(f".{output.name}.{secrets.token_hex(4)}.parts"))
        if self.is_main:
            make_folder(folder)
        self.wait()
        try:
            yield folder
            self.wait()
        finally:
            if self.is_main:
                shutil.rmtree(folder, ignore_errors=True)
