"""Recording device work once and replaying it: CUDA graphs, and the tensors that they may read and write.

A recorded graph repeats the same kernels on the same addresses. So whatever changes between replays is written into
buffers that stay where they are; a `Workspace` holds the buffers and the graphs of one batch at a time. Workspaces are
handed from call to call by a `WorkspacePool`. Knows no model.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


Replay = Callable[[], None]

# Workspaces that are kept for later calls when no call uses them; the one unused for longest goes first.
MOST_IDLE = 4

# A workspace has room for a power of two of rows and positions; from here on positions grow by as many as this.
LARGEST_DOUBLING = 512


# Held while a graph is recorded, and where random numbers are drawn on a device: before torch 2.13 a generator does
# not tell the thread that records from those that go on.
RECORDING = threading.RLock()


class CudaRecorder:
    """Records functions as CUDA graphs that share one memory pool, so they must not run at the same time.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream, self.done = torch.cuda.Stream(device), torch.cuda.Event()
        self.used_on = torch.cuda.current_stream(device)

    def take_over(self) -> None:
        """See that what another stream has enqueued on the buffers is done before this one touches them."""
        current = torch.cuda.current_stream(self.device)
        if current != self.used_on:
            self.used_on.synchronize()
            self.used_on = current

    def host_buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory of the host that a graph can write to."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> None:
        """Set the mark behind everything that was enqueued."""
        self.done.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Wait until the device has passed the mark; what was enqueued behind it may still be running."""
        self.done.synchronize()

    def record(self, function: Callable[[], None]) -> Replay:
        """Run `function` once, as it is, and once more to record it; returns what replays it.

        It must be safe to run twice on the same buffers, and may not read anything on the host.
        """
        with RECORDING, torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                function()  # libraries are initialised and kernels compiled outside of the graph
                self.stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with no_collection():  # what it would free could be something that a recording may not touch
                    # Only this thread may not do what a recording forbids: others go on generating.
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    try:
                        function()
                    finally:
                        graph.capture_end()
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's cyclic garbage collector is off inside."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# By type of device, what records graphs there.
RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaRecorder}


def are_recorded_on(device: torch.device) -> bool:
    """Whether graphs are recorded on such a device."""
    return device.type in RECORDERS


class Workspace:
    """Buffers at fixed addresses and the graphs that were recorded on them.

    Args:
        recorder: Of the device.
        buffers: By name.
    """

    def __init__(self, recorder: Any, buffers: dict[Hashable, torch.Tensor]):
        self.recorder, self.buffers = recorder, buffers
        self.graphs: dict[Hashable, Replay] = {}

    def buffer(self, name: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The buffer of that name, made when it is first asked for."""
        if name not in self.buffers:
            with torch.inference_mode(False):  # what inference mode makes can be written in inference mode alone
                self.buffers[name] = make()
        return self.buffers[name]

    def graph(self, key: Hashable, function: Callable[[], None]) -> Replay:
        """What replays `function`, recorded when its key is first asked for."""
        if key not in self.graphs:
            self.graphs[key] = self.recorder.record(function)
        return self.graphs[key]


class Room(NamedTuple):
    """What a workspace has room for: a number of rows, and at most so many positions and source tokens."""

    rows: int
    positions: int
    source: int

    def serves(self, needed: Room) -> bool:
        """Whether a call that needs `needed` may use it. Rows must be as many: others would be computed, too."""
        return self.rows == needed.rows and self.positions >= needed.positions and self.source >= needed.source


class Loan(NamedTuple):
    """A workspace that is in use, until `end` is called."""

    room: Room
    workspace: Workspace
    end: Callable[[], None]


class WorkspacePool:
    """Workspaces by what they have room for. One belongs to one call at a time, from whatever thread.

    A call keeps its workspace until the cache that it was lent for, which `generate` returns, is collected: as long as
    that cache is referenced no later call writes to it. Tensors taken from it do not count.
    """

    def __init__(self):
        self._idle: list[tuple[Room, Workspace]] = []  # the one used last is the last
        self._lent: weakref.WeakKeyDictionary[Any, Loan] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()  # a collection inside of it may bring a workspace back

    def lend(self, owner: Any, room: Room, make: Callable[[Room], Workspace]) -> Workspace:
        """The workspace that `owner` has, if it serves, else the smallest idle one that does, or a new one."""
        with self._lock:
            loan = self._lent.get(owner)
            if loan is not None and not loan.room.serves(room):
                del self._lent[owner]
                loan.end()
                loan = None
            idle = None if loan is not None else self._take_idle(room)
        if loan is None:
            room, workspace = idle or (room, self._make(room, make))
            end = weakref.finalize(owner, give_back, weakref.ref(self), room, workspace)
            end.atexit = False
            loan = self._lent[owner] = Loan(room, workspace, end)
        loan.workspace.recorder.take_over()
        return loan.workspace

    def lent_to(self, owner: Any) -> Workspace:
        """The workspace that `owner` has."""
        return self._lent[owner].workspace

    def _make(self, room: Room, make: Callable[[Room], Workspace]) -> Workspace:
        """A new workspace; where memory runs out, idle ones are dropped for it."""
        try:
            return make(room)
        except torch.OutOfMemoryError:
            with self._lock:
                self._idle.clear()
            return make(room)

    def _take_idle(self, needed: Room) -> tuple[Room, Workspace] | None:
        places = [place for place, (room, _) in enumerate(self._idle) if room.serves(needed)]
        return self._idle.pop(min(places, key=lambda place: self._idle[place][0])) if places else None

    def take_back(self, room: Room, workspace: Workspace) -> None:
        """Keep an idle workspace, and drop the one unused for longest if there are too many."""
        with self._lock:
            self._idle.append((room, workspace))
            del self._idle[:-MOST_IDLE]

    def __len__(self) -> int:
        return len(self._idle)


def give_back(pool: weakref.ref[WorkspacePool], room: Room, workspace: Workspace) -> None:
    """Return a workspace to its pool, if that is still there."""
    if (found := pool()) is not None:
        found.take_back(room, workspace)


def roomy(count: int, smallest: int = 1) -> int:
    """Room for at least `count`: a power of two from `smallest` on, then multiples of `LARGEST_DOUBLING`."""
    if count > LARGEST_DOUBLING:
        return -(-count // LARGEST_DOUBLING) * LARGEST_DOUBLING
    return max(smallest, 1 << (count - 1).bit_length())
