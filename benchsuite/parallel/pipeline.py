"""Pipeline parallelism: a replica's chain of layers is divided over its parts by layer.

torch.distributed.pipelining runs the schedules: GPipe (Huang et al. 2019), 1F1B (Narayanan et al.
2019), interleaved 1F1B (Narayanan et al. 2021) and zero bubble (Qi et al. 2023, its ZB-H1 over
chunks). A part holds V chunks (`cuts.py`); a batch goes through in m micro-batches, the gradient is
that of the mean over them. Sent per step: of each of the stages x V - 1 cuts, m activations forward
and m gradients back, 2 (stages x V - 1) m a bytes in all; the gradient of a tied parameter both
ways between its holders; the loss, 8 bytes to each other part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchsuite import parallel
from benchsuite.comm import Handle, Traffic
from benchsuite.errors import UsageError
from benchsuite.parallel import cuts, pieces, slots
from benchsuite.parallel.pieces import Piece
from benchsuite.parallel.replica import Replica, sum_traffic, tell_traffic
from benchsuite.parallel.stages import Chunk, Run, start
from benchsuite.topology import spread_traffic
from benchsuite.workload import (
    Batch,
    DeviceLoss,
    Ready,
    Shapes,
    Workload,
    micro_batches,
    seeded_layers,
    trained_parameters,
    views,
)


@dataclass
class Parallel(parallel.ModelParallel):
    """The layers of a replica are divided over its `model_parallel` ranks, the stages."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of the micro-batches' forward and backward passes."""

    num_micro_batches: int = 4
    """Pieces of a replica's share of a batch that are under way at once (m)."""

    num_chunks: int = 0
    """Runs of layers on each stage (V); 0 = 2 with interleaved, 1 with the others."""

    several_chunks = {"interleaved": 2}  # V where num_chunks = 0; 1 of a schedule that is not here
    autocast = True
    divides = True
    colour = 2
    marks = ("s", "P")
    order = 1
    stages = True
    at_least = {"num_micro_batches": 1}
    wall_only = "the library runs by the wall clock"
    refuses = (
        {
            "rule": "cuda",
            "when": 'cell.device != "cpu" and cell.backend == "gloo" and cell.model_parallel > 1',
            "reason": (
                "parallel = {name} with device = {cell.device} and backend = gloo: gloo sends "
                "the host's memory from point to point, and the library hands it the device's"
            ),
            "remedy": "set backend = nccl (a device per local rank), or device = cpu",
        },
    )

    @property
    def chunks(self) -> int:
        """Runs of layers on each stage (V), where 0 has become the schedule's own number."""
        return self.num_chunks or self.several_chunks.get(self.schedule, 1)

    def build(
        self,
        workload: Workload,
        replica: Replica | None,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        autocast: bool = False,
    ) -> PipelinePart:
        """This rank's stage of the model, in the process group of its replica."""
        assert replica is not None, "a pipeline's stages need each other"

        layers = seeded_layers(workload, seed)
        nn.Sequential(*layers).to(dtype)

        return PipelinePart(self, workload, replica, layers, device=device, autocast=autocast)

    def pieces(
        self, workload: Workload, layers: Sequence[nn.Module], size: int
    ) -> list[list[Piece]]:
        """Lists what each part holds: whole parameters of its layers, copies of tied ones last."""
        return cuts.pieces_of(self.cuts(workload, layers, size), layers)

    def cuts(self, workload: Workload, layers: Sequence[nn.Module], size: int) -> cuts.Cuts:
        """Says which layers stand on which part."""
        return cuts.cuts(workload, layers, size=size, num_chunks=self.chunks)

    def predicted_traffic(
        self,
        workload: Workload,
        layers: Sequence[nn.Module],
        batch: Batch,
        *,
        size: int,
        itemsize: int,
        clip: bool,
        backend: str = "gloo",
    ) -> Traffic:
        """Activations and their gradients across the cuts, tied gradients, and the loss."""
        found = self.cuts(workload, layers, size)
        traffic = Traffic()
        m = self.num_micro_batches
        leaves = cuts.outputs(found, cuts.on_meta(layers), micro_batches(batch, m)[0].x)

        for here, there, num_bytes in cuts.crossings(found, leaves, itemsize):
            traffic.add(here, there, num_bytes * m, m)
            traffic.add(there, here, num_bytes * m, m)

        # The holders of a tied parameter tell each other its gradient, in pairs.
        shapes = {name: p.shape for name, p in trained_parameters(nn.Sequential(*layers)).items()}

        for name, parts in cuts.holders(found, layers).items():
            for one, other in combinations(parts, 2):
                for edge in ((one, other), (other, one)):
                    traffic.add(*edge, shapes[name].numel() * itemsize)

        # The last part tells the others the loss; with clipping all add up the norm's square.
        traffic += tell_traffic(size, size - 1)
        if clip:
            traffic += sum_traffic(size)

        return traffic

    def predicted_inference(
        self,
        workload: Workload,
        layers: Sequence[nn.Module],
        x: Tensor,
        *,
        size: int,
        itemsize: int,
    ) -> Traffic:
        """Activations go from stage to stage once, then the last one's output to all."""
        found = self.cuts(workload, layers, size)
        traffic = Traffic()
        leaves = cuts.outputs(found, cuts.on_meta(layers), x)

        for here, there, num_bytes in cuts.crossings(found, leaves, itemsize):
            traffic.add(here, there, num_bytes)

        return traffic + spread_traffic(leaves[-1].numel(), itemsize, size)


class PipelinePart(parallel.PartOfReplica):
    """One stage of a replica.

    Its flat vectors `params` and `grad` are those of its layers' parameters, copies of tied ones
    last.
    """

    has_grad_buffer = True

    def __init__(
        self,
        options: Parallel,
        workload: Workload,
        replica: Replica,
        layers: Sequence[nn.Module],
        *,
        device: torch.device,
        autocast: bool,
    ) -> None:
        self._options = options
        self._workload = workload
        self.replica = replica
        self.num_gradients = 0
        self._cuts = options.cuts(workload, layers, replica.size)
        held = options.pieces(workload, layers, replica.size)[replica.part]
        named = trained_parameters(nn.Sequential(*layers))
        self.shapes: Shapes = pieces.shapes_of(held)
        self.num_owned = pieces.num_owned(held)
        self._parameters = [named[piece.name] for piece in held]

        # Parameters that other parts hold too -> the parts that hold them.
        holders = cuts.holders(self._cuts, layers)
        self._tied = {
            piece.name: holders[piece.name] for piece in held if len(holders[piece.name]) > 1
        }

        # The whole chain without its numbers, for the shapes of what crosses the cuts.
        self._bare = cuts.on_meta(layers)

        self.params = pieces.cut(named, held).to(device)
        self.module: nn.Module = nn.ModuleDict(
            {str(at): layers[at] for at in self._cuts.layers_of(replica.part)}
        )

        self.module.to(device)
        for p, view in zip(self._parameters, views(self.params, self.shapes).values(), strict=True):
            p.data = view

        self.use_grad_buffer(torch.zeros_like(self.params))
        self._chunks = {
            number: Chunk(
                [layers[at] for at in self._cuts.chunks[number]],
                dtype=self.params.dtype,
                device=device,
                autocast=autocast,
                is_last=number == len(self._cuts.chunks) - 1,
            )
            for number in self._cuts.of_part(replica.part)
        }

        self._runs: dict[Any, Run] = {}  # by the shape of a micro-batch
        self._last_run: Run | None = None
        self._last = replica.size - 1  # the part with the loss

    def use_grad_buffer(self, buffer: Tensor) -> None:
        """Lets the gradient live in memory that a topology owns.

        Every parameter's `.grad` is a view of it, and the library adds to that.
        """
        self.grad = buffer
        self._grads = views(self.grad, self.shapes)

        for p, view in zip(self._parameters, self._grads.values(), strict=True):
            p.grad = view

    # -- the gradient ------------------------------------------------------------------------------

    def gradient(
        self, batch: Batch, ready: Ready | None = None, until: Handle | None = None
    ) -> float | None:
        """Fills `grad` by one pass of the schedule, and returns the mean loss on every part."""
        if ready is not None or until is not None:
            raise ValueError(
                "a pipeline's gradient is whole when its last micro-batch is: no `ready`, no "
                "`until`"
            )

        self.num_gradients += 1
        run = self._run(batch)
        self.grad.zero_()
        expected = self._expect()
        loss = self._tell(run.step(batch), expected)

        if self._tied:
            self._sum_tied()

        return float(loss) if loss.device.type == "cpu" else DeviceLoss(loss)

    def _run(self, batch: Batch) -> Run:
        """Returns the library's stages and schedule for batches of this shape, made once."""
        x = batch.x
        count = self._options.num_micro_batches

        if not isinstance(x, Tensor) or batch.num_samples % count:
            raise UsageError(
                f"parallel = pipeline: a batch of {batch.num_samples} samples, x is "
                f"{type(x).__name__}: it needs one "
                f"tensor whose samples divide into num_micro_batches({count}): set "
                "num_micro_batches to a divisor"
            )

        key = (x.shape, x.dtype)

        if key not in self._runs:
            first = micro_batches(batch, count)[0].x
            self._runs[key] = start(
                self._options.schedule,
                self._chunks,
                (first, *cuts.outputs(self._cuts, self._bare, first)),
                workload=self._workload,
                replica=self.replica,
                num_micro_batches=count,
            )

        self._last_run = self._runs[key]
        return self._last_run

    def _sum_tied(self) -> None:
        """Replaces the gradient of each tied parameter by the sum over its holders.

        Every holder adds in the order of the chain, so all have the same bits.
        """
        part = self.replica.part
        comm = self.replica.comm

        for name, parts in self._tied.items():
            mine = self._grads[name].view(-1)
            terms = {
                part: mine,
                **{other: torch.empty_like(mine) for other in parts if other != part},
            }

            # One order of the pairs for all holders, so that nobody waits in a circle.
            for one, other in combinations(parts, 2):
                if part in (one, other):
                    peer = other if part == one else one
                    comm.sendrecv(mine, peer, terms[peer], peer)

            if len(parts) == 2:
                mine.add_(terms[parts[0] if part == parts[1] else parts[1]])  # a + b = b + a
            else:
                mine.copy_(torch.stack([terms[holder] for holder in parts]).sum(0))

    def _expect(self) -> tuple[Handle, Tensor] | None:
        """Posts the receive of the loss before the passes, where receives can be posted early.

        The last part is the first to know the loss, and so need not wait for the others to ask.
        """
        comm = self.replica.comm
        if comm.rank == self._last or not comm.posts_ahead:
            return None

        return self._receive()

    def _receive(self) -> tuple[Handle, Tensor]:
        """Posts a receive of the loss, a float64, from the last part."""
        number = torch.zeros(1, dtype=torch.float64, device=self.replica.device)
        return self.replica.comm.irecv(number, self._last), number

    def _tell(self, losses: Sequence[Tensor], expected: tuple[Handle, Tensor] | None) -> Tensor:
        """Returns the mean loss on every part: the last one knows it, and tells the others."""
        if losses:
            loss = torch.stack([each.detach() for each in losses]).sum().double().reshape(1)
            for part in range(self._last):
                self.replica.comm.send(loss, part)

            return loss

        handle, loss = expected or self._receive()
        handle.wait()

        return loss

    def gradient_norm(self) -> float:
        """Norm of the replica's whole gradient; copies of tied parameters count once."""
        return self.replica.norm(self.grad[: self.num_owned])

    def finite(self) -> bool:
        """Whether every part's parameters are finite."""
        return self.replica.all_finite(self.params)

    # -- evaluation --------------------------------------------------------------------------------

    def infer(self, x: Tensor) -> Tensor:
        """Runs `x` forward from stage to stage, and returns the output on every part.

        This is outside of the schedule, but through the library's group; the last stage tells all.
        """
        replica = self.replica
        found = self._cuts
        leaves = cuts.outputs(found, self._bare, x)
        device = x.device
        x = x.to(replica.device)
        training = self.module.training
        last = len(leaves) - 1
        self.module.eval()

        try:
            with torch.no_grad():
                for number, chunk in self._chunks.items():
                    if number and replica.size > 1:
                        x = self._empty(leaves[number - 1])
                        replica.group.recv([x], found.part_of(number - 1), 0).wait()

                    x = chunk(x)
                    if number < last and replica.size > 1:
                        replica.group.send([x], found.part_of(number + 1), 0).wait()
        finally:
            self.module.train(training)

        output = (
            self._chunks[last].fit_to_send(x) if last in self._chunks else self._empty(leaves[last])
        )

        if replica.size > 1:
            everywhere = torch.distributed.BroadcastOptions()
            everywhere.rootRank = found.part_of(last)
            replica.group.broadcast([output], everywhere).wait()

        return output.to(device)

    def _empty(self, like: Tensor) -> Tensor:
        """Memory for what comes from another stage, of the shape of a tensor on the meta device."""
        dtype = self.params.dtype if like.is_floating_point() else like.dtype
        return torch.empty(like.shape, dtype=dtype, device=self.params.device)

    # -- what others ask ---------------------------------------------------------------------------

    def share(self, shard: int, num_shards: int) -> tuple[int, int]:
        """Every stage reads the replica's whole share: the first one x, the last one y."""
        return shard, num_shards

    def wrap(self, wrapper: Any) -> None:
        """Is never called: the rules refuse a library's wrapper with a pipeline."""
        raise AssertionError("a library's wrapper with a pipeline: refused by the rules")

    def backward(self, batch: Batch) -> float:
        """Is never called: the rules refuse a library's wrapper with a pipeline."""
        raise AssertionError("a library's wrapper with a pipeline: refused by the rules")

    @property
    def executed(self) -> Sequence[slots.Action]:
        """The passes of this part in the last gradient, in their order."""
        return self._last_run.executed if self._last_run is not None else ()

    def facts(self) -> Mapping[str, Any]:
        """What the run file keeps: the schedule, the balance of the cuts, and the bubble."""
        options = self._options
        size = self.replica.size
        part = self.replica.part
        m = options.num_micro_batches
        chunks = options.chunks
        schedule = options.schedule
        run = self._last_run

        return {
            "schedule": schedule,
            "num_micro_batches": m,
            "num_chunks": chunks,
            "layers": self._cuts.layers_of(part),
            "load": self._cuts.load_of(part),
            "load_by": self._cuts.by,
            "balance": self._cuts.balance,
            "tied_bytes": sum(self._grads[name].nbytes for name in self._tied),
            "bubble_predicted": slots.predicted(
                schedule, stages=size, num_micro_batches=m, num_chunks=chunks
            ),
            "in_flight_expected": slots.in_flight_expected(
                schedule, stages=size, part=part, num_micro_batches=m
            ),
            **(run.facts() if run is not None else {}),
        }
