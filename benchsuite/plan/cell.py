"""A cell: everything that may change a number, and nothing else.

A cell is one point of the cross workload x parallel x sync x topology x compression, with so many
workers, on such a cluster. It is frozen; its id is a hash of its canonical JSON without the seed,
so the same question asked twice has one name. Plans (TOML files that state a question and a grid)
become cells in `benchsuite/plan/plan.py`; whether a cell means something is decided in
`benchsuite/rules/__init__.py`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from benchsuite.errors import UsageError
from benchsuite.plan import compute_time, declared, plugins
from benchsuite.plan.hashing import canonical, checksum, plain_numbers

Scalar = bool | int | float | str
Options = Mapping[str, Mapping[str, Scalar]]

# The axes whose members are plug-ins: cell field -> plug-in kind (they have the same name).
AXES = ("workload", "parallel", "sync", "topology", "compression")

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "server_placement": ("own_host", "with_worker"),
        "rank_placement": ("replica_major", "part_major"),
        "precision": ("fp32", "fp64", "bf16"),
        "backend": ("gloo", "nccl", "mpi"),
        "device": ("cpu", "cuda"),
        "clock": ("wall", "virtual"),
        "batch_mode": ("fixed_global", "fixed_per_worker"),
        "tuning": ("same", "per_strategy"),
        "gradients": ("computed", "none"),
    }
)
# Fields that came after the first stored runs: absent from the id where they say what was always
# so.
_LATER = ("gradients", "receive_cost", "lr_factor")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a run may use. `samples` and `steps` (of one global batch) exclude each other."""

    samples: int | None = None
    steps: int | None = None
    timeout_s: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One experiment, whole. See `resolve` for what is filled in where a field is left open."""

    workload: str = "cnn"
    preset: str = ""  # "" = the first preset of the workload's file
    parallel: str = "data"
    sync: str = "synchronous"
    topology: str = "native"
    compression: str = "none"
    options: Options = field(default_factory=dict)  # member -> option -> value

    # How many ranks there are, and where they stand.
    replicas: int = 1
    model_parallel: int = 1
    servers: int | None = None  # None = 1 with a parameter server, else 0
    server_placement: str = "own_host"
    rank_placement: str = "replica_major"  # worker rank = replica x model_parallel + part

    # What each rank computes with.
    threads: int = 1
    precision: str = "fp32"
    backend: str = "gloo"
    device: str = "cpu"

    # What passes for time, and on which machines.
    clock: str = "wall"
    cluster: str = "local"
    hosts: int = 1
    link_mbit: float | None = None
    link_latency_us: float | None = None
    compute_time: Mapping[str, Scalar] | None = (
        None  # virtual clock only: {kind, mean_s, cv ..}; None = 1 s each
    )
    receive_cost: Mapping[str, Scalar] | None = None  # virtual clock only: {copy_s_per_gib, incast}
    gradients: str = "computed"  # none: virtual clock only, for staleness and waiting at any N

    # Who is slow, how the work is shared out, and with which learning rate.
    straggler: Mapping[str, float] = field(default_factory=dict)  # worker -> slow-down factor
    batch_mode: str = "fixed_global"
    # per_strategy: lr_factor is chosen by trials before the runs (`benchsuite/running/tune.py`)
    tuning: str = "same"
    lr_factor: float = (
        1.0  # the recipe's learning rate times this, for every strategy and workload alike
    )

    # What a run may use, what is done to it on purpose, and what its random numbers begin with.
    budget: Budget = field(default_factory=Budget)
    faults: tuple[Mapping[str, Scalar], ...] = ()  # injected by tests: {rank, phase, step, signal}
    seed: int = 0

    # Computed by `resolve`, never written by a user.
    sources: Mapping[str, str] = field(
        default_factory=dict
    )  # axis -> sha256 of a plug-in given by path

    # Numbers that follow from the fields: they are no fields, so no cell can contradict itself.
    @property
    def num_workers(self) -> int:
        """Ranks that compute gradients: replicas x model_parallel."""
        return self.replicas * self.model_parallel

    @property
    def num_servers(self) -> int:
        """Ranks that serve parameters (the last ones)."""
        if self.servers is not None:
            return self.servers
        return 1 if declared.topology(self.topology).kind == declared.SERVER else 0

    @property
    def world_size(self) -> int:
        """replicas x model_parallel + servers."""
        return self.num_workers + self.num_servers

    @property
    def id(self) -> str:
        """First 12 hex digits of sha256 over the canonical JSON without the seed.

        48 bits: among a million cells two would share an id with a chance of 0.2 %. It names cells
        in files and folders, so it has to be short enough to be typed.
        """
        return checksum(canonical(identity(self)).encode())[:12]

    @property
    def label(self) -> str:
        """Short human name, e.g. `cnn/digits synchronous ring N=2`.

        It names what differs from a plain cell, and is no identity: two cells may have the same
        label.
        """
        workload = plugins.stem(self.workload)
        parts = [f"{workload}/{self.preset}" if self.preset else workload]
        if self.parallel != "data":
            parts.append(f"{self.parallel}({self.model_parallel})")

        parts += [plugins.stem(self.sync), plugins.stem(self.topology)]
        if self.compression != "none":
            parts.append(plugins.stem(self.compression))

        parts.append(f"N={self.replicas}")

        if self.num_servers > 1:
            parts.append(f"S={self.num_servers}")
        if self.server_placement == "with_worker":
            parts.append("servers with workers")
        if self.rank_placement == "part_major":
            parts.append("parts together")
        if self.hosts > 1:
            parts.append(f"{self.hosts} hosts")

        if self.clock == "virtual":
            parts.append("virtual" if self.gradients == "computed" else "virtual, timing only")
        if self.compute_time:
            parts.append(str(self.compute_time.get("kind", "")))
        if self.link_mbit is not None:
            parts.append(f"{self.link_mbit:g} Mbit/s")

        if self.straggler:
            parts.append(
                "straggler " + ",".join(f"{w}:{f:g}x" for w, f in sorted(self.straggler.items()))
            )

        if self.lr_factor != 1:
            parts.append(f"lr x{self.lr_factor:g}")
        if self.tuning == "per_strategy":
            parts.append("tuned")
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form; `from_json` restores an equal cell."""
        # `asdict` goes into the budget too; `plain_numbers` makes lists of tuples, as a file would.
        document: dict[str, Any] = plain_numbers(dataclasses.asdict(self))
        return document

    def with_seed(self, seed: int) -> Cell:
        """The same cell with another seed; its id stays."""
        return dataclasses.replace(self, seed=seed)


def from_json(document: Mapping[str, Any]) -> Cell:
    """A cell from its JSON form.

    Unknown keys, of a newer version, raise UsageError: left out they would give another cell under
    the name of this one. Missing keys, of an older version, have their defaults.
    """
    known = {f.name for f in dataclasses.fields(Cell)}
    values = dict(document)
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"cell has unknown fields {unknown}; known: {', '.join(sorted(known))}")

    budget = values.pop("budget", {})
    # JSON knows lists only, and a frozen cell holds a tuple.
    values["faults"] = tuple(values.get("faults", ()))
    return Cell(budget=Budget(**budget), **values)


def identity(cell: Cell) -> dict[str, Any]:
    """The document whose hash is the cell's id: every field but the seed.

    A plug-in given by path stands in it by its name and a hash of its content: the same file in
    another folder is the same cell, and an edited one is another.
    """
    document = cell.to_json()
    document.pop("seed")

    for axis, digest in document.pop("sources").items():
        document[axis] = f"{plugins.stem(document[axis])}@{digest[:16]}"

    # The number that is meant, so that an omitted one and the written default are one cell.
    document["servers"] = cell.num_servers

    # A field that came later would give every stored cell a new id, and every run be missing again.
    defaults = {f.name: f.default for f in dataclasses.fields(Cell)}

    for name in _LATER:
        if document[name] == defaults[name]:
            del document[name]

    return document


def trajectory_key(cell: Cell) -> str | None:
    """A text that is equal for cells whose parameters are the same at every step.

    Such cells of the virtual clock differ in times only, and their strategy and topology declare
    that times do not matter to the parameters (`timing_free`): one of them is trained, the others
    are timed again. None where they do not declare it, under the wall clock, and where no gradient
    is computed.
    """
    if cell.clock == "wall" or cell.gradients == "none":
        return None

    says = (declared.of("sync", cell.sync), declared.of("topology", cell.topology))
    if not all(each.timing_free for each in says):
        return None

    # The seed belongs to it, unlike to an id: another seed trains other parameters.
    return canonical([identity(untimed(cell)) | {"budget": cell.budget.samples}, cell.seed])


def untimed(cell: Cell) -> Cell:
    """The cell in the plainest of virtual worlds: every gradient takes 1 s, links are free."""
    # who shares a host decides what is added first
    by_host = declared.topology(cell.topology).by_host
    return dataclasses.replace(
        cell,
        compute_time=None,
        receive_cost=None,
        straggler={},
        link_mbit=None,
        link_latency_us=None,
        hosts=cell.hosts if by_host else 1,
        server_placement="own_host",
    )


def resolve(cell: Cell) -> Cell:
    """The cell with everything filled in that was left open.

    That is the preset, the options' defaults, the number of servers, the budget in samples, and a
    hash of every plug-in given by path. Two cells that mean the same have the same id afterwards:
    an omitted default equals the written one.

    Raises UsageError for an unknown member, preset or option; the message lists the known ones, the
    nearest first.
    """
    for name, allowed in CHOICES.items():
        if getattr(cell, name) not in allowed:
            raise UsageError(plugins.unknown(name, getattr(cell, name), allowed))

    # Every member is looked up, also those that nothing is taken from: an unknown one is refused
    # here, and not by the rank that would have imported it.
    found = {axis: plugins.find(axis, getattr(cell, axis)) for axis in AXES}
    plugins.find("cluster", cell.cluster)
    # Their paths become absolute: a rank stands in another folder.
    by_path = {axis: member for axis, member in found.items() if member.given_by_path}
    preset, presets = _preset(cell, found["workload"])
    paths: dict[str, Any] = {axis: str(member.path) for axis, member in by_path.items()}

    return dataclasses.replace(
        cell,
        preset=preset,
        options=_options(cell, found, presets),
        servers=cell.num_servers,
        straggler={
            str(int(k)): float(v)
            for k, v in sorted(cell.straggler.items(), key=lambda kv: int(kv[0]))
        },
        budget=_budget(cell, found["workload"], presets),
        compute_time=_compute_time(cell),
        sources={axis: member.digest for axis, member in by_path.items()},
        **paths,
    )


def _compute_time(cell: Cell) -> Mapping[str, Scalar] | None:
    """The compute times with measured values read from their file.

    Under the virtual clock a gradient takes one second where nothing is said.
    """
    if cell.compute_time is None and cell.clock == "virtual":
        return dict(compute_time.DEFAULT)
    return compute_time.resolved(cell.compute_time)


def _preset(cell: Cell, workload: plugins.Plugin) -> tuple[str, Mapping[str, Any]]:
    """The name and the values of the cell's preset; the first one of the file where none is named.

    Raises UsageError where the workload has none, or not this one.
    """
    if not workload.presets:
        raise UsageError(
            f"{workload.path} has no presets: a workload needs at least one, as a literal, e.g. "
            'presets = {"default": {"global_batch": 64, "budget_samples": 15360}}'
        )

    preset = cell.preset or next(iter(workload.presets))
    if preset not in workload.presets:
        raise UsageError(plugins.unknown("preset", preset, workload.presets, of=workload.name))
    return preset, workload.presets[preset]


def _options(
    cell: Cell, found: Mapping[str, plugins.Plugin], preset: Mapping[str, Any]
) -> dict[str, dict[str, Scalar]]:
    """Every option of every member: the default, overridden by the preset, then by the cell.

    Options that came after the first stored runs (`later` in the class) are left out where they
    have their default, so that the ids of older cells stay the same.
    """
    used = {axis: plugins.stem(getattr(cell, axis)) for axis in AXES}

    # An option of a member that the cell does not use would be ignored without a word, and still
    # change the id.
    stray = sorted(set(cell.options) - set(used.values()))
    if stray:
        uses = ", ".join(sorted(set(used.values())))
        raise UsageError(
            f"options given for {stray[0]!r}, which this cell does not use; it uses: {uses}"
        )

    options: dict[str, dict[str, Scalar]] = {}

    for axis, member in found.items():
        given = dict(cell.options.get(used[axis], {}))
        # A default that overrides what the preset states is no default.
        stated = preset if axis == "workload" else {}
        # The preset's keys that are no options (budget, target) are for others.
        given = {k: v for k, v in stated.items() if k in member.options} | given
        given = member.resolve_options(given)
        # Left out before hashing, as `_LATER` does for fields of the cell.
        later = set(declared.of(axis, getattr(cell, axis)).later) - set(stated)
        given = {k: v for k, v in given.items() if k not in later or v != member.options[k].default}
        if given:
            options[used[axis]] = given

    return options


def _budget(cell: Cell, workload: plugins.Plugin, preset: Mapping[str, Any]) -> Budget:
    """The budget in samples, whichever way it was given; the preset's where it was not.

    Samples and not steps are compared: with another batch a step is another amount of work.
    """
    budget = dataclasses.replace(cell.budget, timeout_s=float(cell.budget.timeout_s))
    if budget.samples is not None and budget.steps is not None:
        raise UsageError(
            f"budget has samples = {budget.samples} and steps = {budget.steps}: give one of them"
        )

    if budget.samples is not None:
        return budget
    if budget.steps is None:
        return dataclasses.replace(budget, samples=int(preset.get("budget_samples", 0)))
    return dataclasses.replace(
        budget, samples=budget.steps * _global_batch(cell, workload, preset), steps=None
    )


def _global_batch(cell: Cell, workload: plugins.Plugin, preset: Mapping[str, Any]) -> int:
    """Samples of one global batch: the cell's option, else the preset's, else the default of the
    file.

    It works on cells that are not resolved yet, as the budget needs it before.
    """
    option = workload.options.get("global_batch")
    stated = preset.get("global_batch", option.default if option else 0)
    base = cell.options.get(workload.name, {}).get("global_batch", stated)
    return int(base) * (cell.replicas if cell.batch_mode == "fixed_per_worker" else 1)


def global_batch(cell: Cell) -> int:
    """Samples of one synchronous step; 0 where the workload states none.

    With batch_mode = fixed_per_worker that is replicas x the workload's global_batch.
    """

    workload = plugins.find("workload", cell.workload)
    return _global_batch(cell, workload, _preset(cell, workload)[1])


def num_layers(cell: Cell) -> int:
    """Layers of the workload's chain; 0 where the workload states none.

    The preset states `num_layers`, or an option counts them: a class says
    `layers_beside = {"blocks": 2}` where its chain has as many layers as blocks, and two more.
    """
    workload = plugins.find("workload", cell.workload)
    preset = _preset(cell, workload)[1]

    says = cast(declared.Workload, declared.of("workload", cell.workload))

    for option, others in says.layers_beside.items():
        default = workload.options[option].default
        # The cell's own option first, then the preset's, then the default of the file.
        counted: Any = cell.options.get(workload.name, {}).get(option, preset.get(option, default))
        return int(counted) + int(others)

    return int(preset.get("num_layers", 0))
