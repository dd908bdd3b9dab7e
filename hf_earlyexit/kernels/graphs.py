"""Recorded CUDA graphs, and the buffers that they read and write.

A recorded graph repeats the same kernels on the same addresses. So inputs that change between replays are written into
buffers at fixed addresses. A `Workspace` holds the buffers and graphs for one batch at a time, and a `WorkspacePool`
passes workspaces from call to call. Independent of models.
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

# Maximum number of idle workspaces kept for later calls; the least recently used is dropped first.
MOST_IDLE = 4

# Room for rows and positions is a power of two up to this number; above it, a multiple of it (see `roomy`).
LARGEST_DOUBLING = 512


# Held while a graph is recorded and while random numbers are drawn on a device: before torch 2.13, a generator does
# not distinguish the recording thread from other threads.
RECORDING = threading.RLock()


class CudaRecorder:
    """Records functions as CUDA graphs. These share one memory pool, so they must not run at the same time.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream, self.done = torch.cuda.Stream(device), torch.cuda.Event()
        self.used_on = torch.cuda.current_stream(device)

    def take_over(self) -> None:
        """If another stream last used the buffers, wait until its work is done."""
        current = torch.cuda.current_stream(self.device)
        if current != self.used_on:
            self.used_on.synchronize()
            self.used_on = current

    def host_buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Host memory that a graph can write to."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> None:
        """Set a mark after all work enqueued so far."""
        self.done.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Wait until the device has passed the mark; work enqueued after it may still be running."""
        self.done.synchronize()

    def record(self, function: Callable[[], None]) -> Replay:
        """Run `function` once normally and once to record it; returns a function that replays it.

        `function` must be safe to run twice on the same buffers and must not read device values on the host.
        """
        with RECORDING, torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                function()  # initialises libraries and compiles kernels outside of the graph
                self.stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with no_collection():  # a collection could free something that a recording must not touch
                    # Restrict only this thread while it records, since other threads continue to generate.
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    try:
                        function()
                    finally:
                        graph.capture_end()
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay


@contextmanager
def no_collection() -> Iterator[None]:
    """Disable Python's cyclic garbage collector within the context."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# Recorder by device type.
RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaRecorder}


def are_recorded_on(device: torch.device) -> bool:
    """Whether graphs are recorded on devices of this type."""
    return device.type in RECORDERS


class Workspace:
    """Buffers at fixed addresses and the graphs that were recorded on them.

    Args:
        recorder: The device's recorder.
        buffers: Initial buffers by name.
    """

    def __init__(self, recorder: Any, buffers: dict[Hashable, torch.Tensor]):
        self.recorder, self.buffers = recorder, buffers
        self.graphs: dict[Hashable, Replay] = {}

    def buffer(self, name: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The buffer of that name, made at first use."""
        if name not in self.buffers:
            with torch.inference_mode(False):  # tensors made in inference mode can only be written in it
                self.buffers[name] = make()
        return self.buffers[name]

    def graph(self, key: Hashable, function: Callable[[], None]) -> Replay:
        """A function that replays `function`, recorded at the first use of `key`."""
        if key not in self.graphs:
            self.graphs[key] = self.recorder.record(function)
        return self.graphs[key]


class Room(NamedTuple):
    """The size of a workspace: the number of rows, and the maximum numbers of positions and source tokens."""

    rows: int
    positions: int
    source: int

    def serves(self, needed: Room) -> bool:
        """Whether it fits a call that needs `needed`. Row counts must be equal: surplus rows would be computed."""
        return self.rows == needed.rows and self.positions >= needed.positions and self.source >= needed.source


class Loan(NamedTuple):
    """A workspace in use, until `end` is called."""

    room: Room
    workspace: Workspace
    end: Callable[[], None]


class WorkspacePool:
    """A pool of workspaces by size. Each is used by one call at a time; calls may come from any thread.

    A workspace is lent to a cache, which `generate` returns, and comes back when that cache is garbage-collected. As
    long as the cache is referenced, no later call writes to its memory. References to tensors of the cache do not keep
    the workspace.
    """

    def __init__(self):
        self._idle: list[tuple[Room, Workspace]] = []  # least recently used first
        self._lent: weakref.WeakKeyDictionary[Any, Loan] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()  # reentrant: a garbage collection while it is held may return a workspace

    def lend(self, owner: Any, room: Room, make: Callable[[Room], Workspace]) -> Workspace:
        """The workspace of `owner` if it fits, else the smallest idle one that fits, else a new one."""
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
        """The workspace lent to `owner`."""
        return self._lent[owner].workspace

    def _make(self, room: Room, make: Callable[[Room], Workspace]) -> Workspace:
        """Make a new workspace; if memory runs out, drop idle ones and retry."""
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
        """Keep an idle workspace, and drop the least recently used one if there are too many."""
        with self._lock:
            self._idle.append((room, workspace))
            del self._idle[:-MOST_IDLE]

    def __len__(self) -> int:
        return len(self._idle)


def give_back(pool: weakref.ref[WorkspacePool], room: Room, workspace: Workspace) -> None:
    """Return a workspace to its pool, if the pool still exists."""
    if (found := pool()) is not None:
        found.take_back(room, workspace)


def roomy(count: int, smallest: int = 1) -> int:
    """Round `count` up: to a power of two, at least `smallest`; above `LARGEST_DOUBLING`, to a multiple of it."""
    if count > LARGEST_DOUBLING:
        return -(-count // LARGEST_DOUBLING) * LARGEST_DOUBLING
    return max(smallest, 1 << (count - 1).bit_length())
