"""A cell: everything that may change a number, and nothing else.

A cell is one point of the cross workload x parallel x sync x topology x compression, with so many
workers, on such a cluster. It is frozen; its id is a hash of its canonical JSON without the seed, so the
same question asked twice has one name. Plans (TOML files that state a question and a grid) become cells
in `benchsuite/plan.py`; whether a cell means something is decided in `benchsuite/rules.py`.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchsuite import plugins
from benchsuite.errors import UsageError

Scalar = bool | int | float | str
Options = Mapping[str, Mapping[str, Scalar]]

# The axes whose members are plug-ins: cell field -> plug-in kind (they have the same name).
AXES = ("workload", "parallel", "sync", "topology", "compression")

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "server_placement": ("own_host", "with_worker"),
    "rank_placement": ("replica_major", "part_major"),
    "precision": ("fp32", "fp64", "bf16"),
    "backend": ("gloo", "nccl", "mpi"),
    "device": ("cpu", "cuda"),
    "clock": ("wall", "virtual"),
    "batch_mode": ("fixed_global", "fixed_per_worker"),
    "tuning": ("same", "per_strategy"),
})


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
    replicas: int = 1
    model_parallel: int = 1
    servers: int | None = None  # None = 1 with a parameter server, else 0
    server_placement: str = "own_host"
    rank_placement: str = "replica_major"  # worker rank = replica x model_parallel + part
    threads: int = 1
    precision: str = "fp32"
    backend: str = "gloo"
    device: str = "cpu"
    clock: str = "wall"
    cluster: str = "local"
    hosts: int = 1
    link_mbit: float | None = None
    link_latency_us: float | None = None
    compute_time: Mapping[str, Scalar] | None = None  # virtual clock only: {kind, mean_s, cv ..}
    straggler: Mapping[str, float] = field(default_factory=dict)  # worker -> slow-down factor
    batch_mode: str = "fixed_global"
    tuning: str = "same"
    budget: Budget = field(default_factory=Budget)
    faults: tuple[Mapping[str, Scalar], ...] = ()  # injected by tests: {rank, phase, step, signal}
    seed: int = 0
    sources: Mapping[str, str] = field(default_factory=dict)  # axis -> sha256 of a plug-in given by path

    @property
    def num_workers(self) -> int:
        """Ranks that compute gradients: replicas x model_parallel."""
        return self.replicas * self.model_parallel

    @property
    def num_servers(self) -> int:
        """Ranks that serve parameters (the last ones)."""
        if self.servers is not None:
            return self.servers
        return 1 if self.topology == "parameter_server" else 0

    @property
    def world_size(self) -> int:
        """replicas x model_parallel + servers."""
        return self.num_workers + self.num_servers

    @property
    def id(self) -> str:
        """First 12 hex digits of sha256 over the canonical JSON without the seed."""
        return hashlib.sha256(canonical(identity(self)).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """Short human name, e.g. `cnn/digits synchronous ring N=2`."""
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
        if self.straggler:
            parts.append("straggler " + ",".join(f"{w}:{f:g}x" for w, f in sorted(self.straggler.items())))
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form; `from_json` restores an equal cell."""
        return _plain(dataclasses.asdict(self))

    def with_seed(self, seed: int) -> Cell:
        """The same cell with another seed; its id stays."""
        return dataclasses.replace(self, seed=seed)


def from_json(document: Mapping[str, Any]) -> Cell:
    """A cell from its JSON form. Unknown keys (of a newer version) raise UsageError."""
    known = {f.name for f in dataclasses.fields(Cell)}
    values = dict(document)
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"cell has unknown fields {unknown}; known: {', '.join(sorted(known))}")
    budget = values.pop("budget", {})
    values["faults"] = tuple(values.get("faults", ()))
    return Cell(budget=Budget(**budget), **values)


def identity(cell: Cell) -> dict[str, Any]:
    """What the id is a hash of: all fields but the seed; a plug-in given by path by its name and content."""
    document = cell.to_json()
    document.pop("seed")
    for axis, digest in document.pop("sources").items():
        document[axis] = f"{plugins.stem(document[axis])}@{digest[:16]}"
    document["servers"] = cell.num_servers
    return document


def canonical(document: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, NaN refused; 4.0 and 4 are one number."""
    return json.dumps(_plain(document), sort_keys=True, separators=(",", ":"), allow_nan=False)


def resolve(cell: Cell) -> Cell:
    """Fills in all that was left open: preset, options' defaults, servers, samples; hashes path plug-ins.

    Two cells that mean the same have the same id afterwards ("an omitted default equals the written one").
    Raises UsageError for an unknown member, preset or option (the known ones in the message, nearest first).
    """
    sources: dict[str, str] = {}
    options: dict[str, dict[str, Scalar]] = {}
    members = {}
    for axis in AXES:
        member = plugins.find(axis, getattr(cell, axis))
        members[axis] = member
        if member.given_by_path:
            sources[axis] = member.digest
    preset = cell.preset or next(iter(members["workload"].presets), "")
    presets = members["workload"].presets
    if preset not in presets:
        raise UsageError(plugins.unknown("preset", preset, presets, of=members["workload"].name))
    preset_values = presets[preset]
    names = {member.name for member in members.values()}
    stray = sorted(set(cell.options) - names)
    if stray:
        raise UsageError(f"options given for {stray[0]!r}, which this cell does not use; it uses: {', '.join(sorted(names))}")
    for axis in AXES:
        member = members[axis]
        given = dict(cell.options.get(member.name, {}))
        if axis == "workload":
            given = {k: v for k, v in preset_values.items() if k in member.options} | given
        values = member.resolve_options(given)
        if values:
            options[member.name] = values
    budget = cell.budget
    global_batch = int(options.get(members["workload"].name, {}).get("global_batch", preset_values.get("global_batch", 0)))
    if budget.samples is not None and budget.steps is not None:
        raise UsageError(f"budget has samples = {budget.samples} and steps = {budget.steps}: give one of them")
    if budget.samples is None:
        scale = cell.replicas if cell.batch_mode == "fixed_per_worker" else 1
        samples = (
            int(preset_values.get("budget_samples", 0)) if budget.steps is None else budget.steps * global_batch * scale
        )
        budget = Budget(samples=samples, timeout_s=float(budget.timeout_s))
    else:
        budget = Budget(samples=int(budget.samples), timeout_s=float(budget.timeout_s))
    paths = {axis: str(members[axis].path) for axis in sources}
    for name, allowed in CHOICES.items():
        if getattr(cell, name) not in allowed:
            raise UsageError(plugins.unknown(name, getattr(cell, name), allowed))
    return dataclasses.replace(
        cell,
        preset=preset,
        options=options,
        servers=cell.num_servers,
        straggler={str(int(k)): float(v) for k, v in sorted(cell.straggler.items(), key=lambda kv: int(kv[0]))},
        budget=budget,
        sources=sources,
        **paths,
    )


def global_batch(cell: Cell) -> int:
    """Samples of one synchronous step of a resolved cell (fixed_per_worker: replicas x the preset's)."""
    member = plugins.find("workload", cell.workload)
    base = cell.options.get(member.name, {}).get("global_batch", member.presets[cell.preset].get("global_batch", 0))
    return int(base) * (cell.replicas if cell.batch_mode == "fixed_per_worker" else 1)


def num_layers(cell: Cell) -> int:
    """Layers of the workload's chain as its preset states them (0 = not stated)."""
    member = plugins.find("workload", cell.workload)
    return int(member.presets.get(cell.preset, {}).get("num_layers", 0))


def _plain(value: Any) -> Any:
    """Mappings and sequences as dict and list; a float that is a whole number as int; paths as text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, Path):
        return str(value)
    return value
