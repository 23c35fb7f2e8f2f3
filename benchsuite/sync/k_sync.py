"""K-sync: the server's step is the mean of the first K of N gradients (Dutta et al. 2018; Chen et
al. 2016).

With `backup_workers = c`, K = N - c: synchronous training that does not wait for its c slowest.
There are four forms:

- K-sync (wait, not batch): a step is made of the first K workers of a version; who comes later was
  too late (`late`).
- K-batch-sync (wait, batch): a step is made of the first K gradients; a worker that is done takes
  another batch meanwhile.
- K-async (not wait, not batch): a step is made of K workers, each held until then; the others go
  on with what they have.
- K-batch-async (not wait, batch): every K gradients are a step, and nobody is held.

`late = finish`: a gradient that comes after its version is over is dropped, and its worker answered
with the newest parameters. `late = cancel`: when a version is over everybody is answered, and who
is still computing gives up. Dropped and given-up gradients count as used samples.

Sends M bytes per push and M per answer, as `synchronous` does over a parameter server. The server
keeps K gradients and their mean, (K + 1) M; a worker keeps M bytes for the answer with `cancel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchsuite import sync
from benchsuite.comm import Comm, Handle, Traffic
from benchsuite.compression import Compression
from benchsuite.errors import UsageError
from benchsuite.sync import Apply, Events, ServerPolicy, Setting, Work, count, hand_out
from benchsuite.sync.averaging import largest_slice
from benchsuite.sync.push_pull import push_pull_traffic
from benchsuite.topology import Topology, rank_order_sum
from benchsuite.topology.parameter_server import Topology as ParameterServer
from benchsuite.topology.parameter_server import clip_traffic
from benchsuite.update import Updater
from benchsuite.workload import Batch, Part, Recipe, Shapes, numel


@dataclass
class Strategy(sync.Strategy):
    """The first K gradients of a version make a step, whoever they come from.

    The slowest do not hold the others up, and their work is lost or stale.
    """

    backup_workers: int = 1
    """c: a step is the mean of N - c gradients (0 = synchronous)."""

    late: Literal["finish", "cancel"] = "finish"
    """A gradient whose version is over: `finish` computes it (it is dropped); `cancel`: virtual
    clock only.
    """

    batch: bool = False
    """Counts gradients instead of workers: a worker that is done goes on at once, and may be in a
    step twice.
    """

    wait: bool = True
    """False: no gradient is too late, stale ones enter the step that they come in time for
    (K-async).
    """

    lr_rule: Literal["equal_sample", "same"] = "equal_sample"
    """With wait = false there are N/K times as many steps: `equal_sample` takes lr K/N, `same` the
    synchronous lr.
    """

    snapshot_of = "servers"
    clips_mean = True

    order = 2
    colour = 1
    topologies = ("server",)
    topologies_why = (
        "workers are answered one by one; a ring is a collective: every rank must enter the same "
        "step"
    )
    by_arrival = True
    model_parallel = False
    takes_votes = False
    refuses = (
        {
            "rule": "backup workers",
            "when": "not 0 <= backup_workers < max(cell.replicas, 1)",
            "reason": (
                "backup_workers({backup_workers:g}) of replicas({cell.replicas}): K = N - c = "
                "{cell.replicas - backup_workers:g}, and 1 <= K <= {cell.replicas} is needed"
            ),
            "remedy": "set backup_workers to 0 .. {max(cell.replicas, 1) - 1}",
        },
        {
            "rule": "late",
            "when": 'late == "cancel" and wait == False',
            "reason": "late = cancel with wait = false: without waiting no gradient is too late",
            "remedy": "set late = finish, or wait = true",
        },
        {
            "rule": "late",
            "when": 'late == "cancel" and cell.clock == "wall"',
            "reason": "late = cancel with clock = wall: a real backward pass is not abandoned",
            "remedy": "set late = finish, or clock = virtual",
        },
        {
            "rule": "k_sync servers",
            "when": "cell.num_servers > 1",
            "reason": (
                "servers = {cell.num_servers} with sync = {name}: each would close its versions "
                "with other workers'"
            ),
            "remedy": "set servers = 1",
        },
    )

    # -- a run -------------------------------------------------------------------------------------

    def start(
        self, comm: Comm, part: Part, recipe: Recipe, topology: Topology, compression: Compression
    ) -> None:
        assert isinstance(topology, ParameterServer), "rules: k_sync needs parameter_server"
        self._comm = comm
        self._part = part
        self._recipe = recipe
        self._topology = topology

        self._num_workers = topology.num_workers
        if not 0 <= self.backup_workers < self._num_workers:
            raise UsageError(
                f"backup_workers = {self.backup_workers} of {self._num_workers} workers: K = N - c "
                f"must be at least 1; set backup_workers to at most {self._num_workers - 1}"
            )

        self._k = self._num_workers - self.backup_workers

        # Shards of the budget in all, and the one that this worker has taken.
        self._num_pushes = recipe.budget // recipe.global_batch * self._num_workers
        self._index = 0

        self.events = {"pushes": 0, "replies": 0}
        self._cancels = self.late == "cancel" and self.wait
        if self._cancels and comm.rank < self._num_workers:
            self.events["abandoned"] = 0

            # An answer may come while the gradient still reads the parameters: it needs a vector
            # of its own. `_answer` has its receives, posted before the gradient begins.
            self._newest = torch.empty_like(part.params)
            self._answer: list[Handle] = []

    def make_updater(self, params: Tensor) -> Updater:
        # Without waiting every gradient is used, so a budget has N/K times as many steps.
        more_steps = self.lr_rule == "equal_sample" and not self.wait
        share = self._k / self._num_workers if more_steps else 1.0
        return Updater(params, self._recipe, lr_scale=share)

    def next_index(self) -> Work | None:
        self._index, work = hand_out(self._comm, self._num_workers, self._num_pushes)
        return work

    def step(self, batch: Batch) -> float | None:
        """Computes one gradient, pushes it, and loads the answer, or gives it up (`cancel`)."""
        if self._cancels:
            return self._step_unless_over(batch)

        part = self._part
        loss = part.gradient(batch)
        assert loss is not None
        self._topology.exchange(part.grad, part.params, tag=self._index)
        self.events["pushes"] += 1
        self.events["replies"] += 1

        return loss

    def _step_unless_over(self, batch: Batch) -> float | None:
        """Computes a gradient, and gives it up if the version is over before it is done.

        The server answers everybody as soon as a version is over. So the answer's arrival is the
        sign to give up, and the gradient looks out for it (`until`).
        """
        if not self._answer:
            self._answer = self._topology.expect(self._newest)

        loss = self._part.gradient(batch, until=self._answer[0])
        if loss is None:
            self._topology.abandon()
            self.events["abandoned"] += 1
        else:
            for sending in self._topology.push(self._part.grad, tag=self._index):
                sending.wait()

            self.events["pushes"] += 1

        self._take_answer()

        return loss

    def _take_answer(self) -> None:
        """Waits for the answer, loads it, and posts the receives of the next one."""
        for receiving in self._answer:
            receiving.wait()

        self._part.params.copy_(self._newest)
        self._answer = self._topology.expect(self._newest)
        self.events["replies"] += 1

    def finish(self) -> None:
        self._topology.goodbye()

        # Answers may have crossed with the goodbye. They would be left over for whoever receives
        # next, so the server says how many it has sent, and all are taken.
        if self._cancels:
            _, num_sent, _ = self._comm.next_ticket()
            while self.events["replies"] < num_sent:
                self._take_answer()

    def snapshot(self) -> Tensor:
        return self._part.params

    def policy(self) -> FirstK:
        return FirstK(self, self._num_workers, self._k, self._comm)

    def num_pushes(self) -> int:
        return self._num_pushes

    # -- predictions -------------------------------------------------------------------------------

    def expected_events(self, num_batches: int, setting: Setting) -> Events:
        """Gives counts that are exact in bytes, unless `late = cancel`.

        How many gradients are given up is decided by the compute times alone; for `cancel` all
        workers are taken to be equally fast.
        """
        num_workers = setting.num_workers
        k = max(1, num_workers - self.backup_workers)
        steps = num_batches * num_workers // k
        pushes = replies = num_batches
        if self.late == "cancel" and self.wait:
            # A version uses up K gradients and those that the others give up at its end.
            used = k + num_workers - 1 if self.batch else num_workers
            steps = num_batches * num_workers // used
            pushes = -(-steps * k // num_workers)
            replies = num_batches

        return {
            "pushes": [pushes] * num_workers,
            "replies": [replies] * num_workers,
            "updates": [0] * num_workers + [steps] * setting.num_servers,
        }

    def state_bytes(self, shapes: Shapes, setting: Setting, *, server: bool = False) -> int:
        # A worker keeps the vector for an answer that comes during its gradient.
        if not server:
            return numel(shapes) * setting.itemsize if self.late == "cancel" and self.wait else 0

        most = setting.num_workers - self.backup_workers + 1  # K gradients and their mean
        return most * largest_slice(shapes, setting)

    def predicted_traffic(self, shapes: Shapes, events: Events, setting: Setting) -> Traffic:
        workers = range(setting.num_workers)
        # Dropped pushes have travelled, given-up ones have not; every answer has.
        traffic = push_pull_traffic(
            shapes,
            setting,
            pushes=[count(events, "pushes", worker) for worker in workers],
            replies=[count(events, "replies", worker) for worker in workers],
        )

        updates = count(events, "updates", setting.num_workers) if setting.clip else 0

        return traffic + clip_traffic(setting.num_workers, setting.num_servers, updates)


class FirstK(ServerPolicy):
    """A server that applies the mean of the first K gradients.

    Which K they are the arrivals decide; they are added in rank order, so that the same K give
    the same bits.
    """

    def __init__(self, form: Strategy, num_workers: int, k: int, comm: Comm) -> None:
        self._wait = form.wait
        self._batch = form.batch
        self._cancels = form.late == "cancel" and form.wait
        self._k = k

        # Workers that have not said goodbye; the comm is for what they are told after that.
        self._active = set(range(num_workers))
        self._comm = comm
        self._num_sent = [0] * num_workers  # answers, by worker
        self.events: dict[str, int] = {"drops": 0}

    def start(self, shard: Tensor, apply: Apply) -> None:
        self._shard = shard
        self._apply = apply
        self._version = 0
        self._mean = torch.empty_like(shard)
        self._slots: list[Tensor] = []  # made when first needed, K of them
        self._arrived: list[int] = []  # worker of each slot's gradient

    def on_push(self, worker: int, version: int, flat: Tensor) -> list[int]:
        """Drops a push (P,) that is too late, or keeps it; the K-th makes the step."""
        if self._wait and version < self._version:
            self.events["drops"] += 1

            # With `cancel` it has its answer already: it was sent when the version was over.
            return self._answered([] if self._cancels else [worker])

        if len(self._slots) == len(self._arrived):
            self._slots.append(torch.empty_like(self._shard))

        # The push lies in the loop's memory, which the next one overwrites.
        self._slots[len(self._arrived)].copy_(flat)
        self._arrived.append(worker)

        closed = self._close()
        if not closed and self._batch:
            return self._answered([worker])

        return closed

    def on_goodbye(self, worker: int) -> list[int]:
        self._active.discard(worker)

        # Every answer to it is counted by now, because the loop sends before it takes a ticket.
        if self._cancels:
            self._comm.ticket(worker, self._num_sent[worker])

        return self._close()

    def _close(self) -> list[int]:
        """Ends the version when K gradients are in, and returns whom to answer.

        It also ends when all workers that are left have pushed: without that the last version of
        a run would wait for workers that have said goodbye.
        """
        due = len(self._arrived)

        if self._batch and self._active:
            whole = due >= self._k  # a worker may be in it twice
        else:
            whole = due >= min(self._k, len(self._active))
        if not due or not whole:
            return []

        # By rank, and gradients of one worker in the order of arrival: `sorted` is stable.
        order = sorted(range(due), key=lambda slot: self._arrived[slot])
        rank_order_sum([self._slots[slot] for slot in order], self._mean)
        self._mean.div_(due)  # fewer than K at the end of a run: then it is their mean
        self._apply(self._mean, num_gradients=due)
        self._version += 1

        last = self._arrived[-1]
        held = sorted(self._arrived)
        self._arrived.clear()
        if self._cancels:
            return self._answered(sorted(self._active))

        # The others were answered when they came; the last one may be gone.
        if self._batch:
            return self._answered([last] if last in self._active else [])

        return self._answered(held)

    def _answered(self, workers: list[int]) -> list[int]:
        """Counts an answer for each of `workers`, and returns them."""
        for worker in workers:
            self._num_sent[worker] += 1

        return workers

    def answer(self, worker: int) -> Tensor:
        return self._shard

    def snapshot(self) -> Tensor:
        return self._shard
