"""Writes the schedule of a virtual cell as Chakra execution traces, for ASTRA-sim.

Chakra: Sridharan et al. 2023, arXiv:2305.14516. `export` writes one file `<cell id>.<rank>.et` per
rank and one JSON file beside them. The format is the package ChakraProtoMsg of mlcommons/chakra,
`schema/protobuf/et_def.proto`, as at f5124d7 and 6dc63e1 (what is used here is the same in both):
each message after its length as a varint, GlobalMetadata first, then nodes. Attributes have the
names and value types that `src/feeder/et_feeder_node.cpp` of mlcommons/chakra (02da5d0) reads and
`astra-sim/workload/feeder_v3` of astra-sim (2aa2bbd) converts:

    every node   is_cpu_op (bool, false: true is its default there), start_ns, duration_ns (uint64)
    send, recv   comm_src, comm_dst, comm_tag (int32), comm_size (int64, bytes)
    collective   comm_type (int64, CollectiveCommType), comm_size (what a rank puts in), comm_tag,
      pg_name (string)

The schema's times are whole microseconds. Begin and end are rounded down separately, so that
nothing begins before what it waits for ends. `start_ns` and `duration_ns` are exact, though no
feeder looks at them. Tags number the messages of an edge, so that a receive has exactly one send
for every reader. `pg_name` is left out where all ranks take part; otherwise it is a number of
`<cell id>.groups.json`, which ASTRA-sim calls its comm-group configuration. Tickets are messages of
their own with `TICKET_BYTES`: without them a server would answer a goodbye that nobody has said.

`ctrl_deps` says what waits for what, in the program order of a rank's tasks. `data_deps` repeats
it, because the feeder of mlcommons/chakra looks at `data_deps` only and a rank's vectors are one
state that goes from each event to the next. A node that needs data from elsewhere follows a
COMM_RECV_NODE. Computing takes the times of the virtual run (in ASTRA-sim, leave `roofline-enabled`
off). A barrier is the schema's BARRIER, which ASTRA-sim does not simulate.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchsuite.comm.traffic import Edge, Traffic
from benchsuite.errors import UsageError
from benchsuite.measure import version
from benchsuite.plan.cell import Cell

if TYPE_CHECKING:
    from benchsuite.plan.plan import Plan
    from benchsuite.virtual.schedule import Event, Schedule

NODE_TYPES = {"compute": 4, "send": 5, "receive": 6, "collective": 7}  # the schema's NodeType
# The schema's CollectiveCommType.
COLLECTIVES = {"all_reduce": 0, "all_gather": 2, "broadcast": 5, "reduce_scatter": 7, "barrier": 9}
VERSION = "0.0.4"  # in GlobalMetadata; mlcommons/chakra's own generators write it too
NS_PER_US = 1000
ALL_RANKS = "world"  # the name of the comm that all ranks share

# The part of the schema that is written: message -> (field, number, type); [] = repeated.
FIELDS: Mapping[str, Sequence[tuple[str, int, str]]] = {
    "AttributeProto": (
        ("name", 1, "string"),
        ("int32_val", 7, "int32"),
        ("int64_val", 9, "int64"),
        ("uint64_val", 13, "uint64"),
        ("bool_val", 27, "bool"),
        ("string_val", 29, "string"),
    ),
    "GlobalMetadata": (("version", 1, "string"), ("attr", 2, "AttributeProto[]")),
    "Node": (
        ("id", 1, "uint64"),
        ("name", 2, "string"),
        ("type", 3, "NodeType"),
        ("ctrl_deps", 4, "uint64[]"),
        ("data_deps", 5, "uint64[]"),
        ("start_time_micros", 6, "uint64"),
        ("duration_micros", 7, "uint64"),
        ("attr", 10, "AttributeProto[]"),
    ),
}
NODE_TYPE_NAMES = (
    "INVALID_NODE",
    "METADATA_NODE",
    "MEM_LOAD_NODE",
    "MEM_STORE_NODE",
    "COMP_NODE",
    "COMM_SEND_NODE",
    "COMM_RECV_NODE",
    "COMM_COLL_NODE",
)
LEFT_OUT = {
    "counters": "fetch_add takes no virtual time; which batch a worker takes decides no byte",
    "locks and shared memory": "inside one host: no message; after a wait for a lock an event "
    "begins late",
    "optimizer steps, data, evaluation": "take no virtual time",
    "receives that no message came for": "posted ahead, and the run was over: nothing waits for "
    "them",
    "alternatives": "what happened here: a server takes pushes in this order, a given-up gradient "
    "is as long as it was",
}


@dataclass(frozen=True)
class Exported:
    """What was written; `about` is the content of the JSON file."""

    traces: tuple[Path, ...]
    path: Path
    about: Mapping[str, Any]


def one_cell(plan: Plan) -> Cell:
    """The one virtual cell of a plan with its seed.

    UsageError where the plan has none or more than one, or where its cell is not virtual.
    """
    found = [*plan.cells, *(each.cell for each in plan.refused)]

    if len(found) * len(plan.seeds) != 1:
        shown = f", the first of them {found[0].label}" if found else ""
        raise UsageError(
            f"{len(found)} cells x {len(plan.seeds)} seeds{shown}: a trace is that of one run; "
            "give one value per flag and one seed, or --only EXPR"
        )

    cell = found[0].with_seed(plan.seeds[0])

    if cell.clock != "virtual":
        raise UsageError(
            f"{cell.label}: clock = {cell.clock}, and a schedule is what the virtual clock did: "
            "add --clock virtual"
        )

    if plan.refused:
        raise UsageError(f"{cell.label}: {plan.refused[0].reason}")
    return cell


def export(cell: Cell, folder: str | Path) -> Exported:
    """Runs a resolved virtual cell without gradients, in this process, and writes its schedule.

    UsageError where protobuf is missing; OSError where `folder` cannot be written.
    """
    format_ = Format()
    from benchsuite.virtual.world import record

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    schedule, simulated = record(cell)
    parts = [name for name in schedule.groups if name != ALL_RANKS]
    groups = {name: str(number) for number, name in enumerate(parts, 1)}
    traces = tuple(folder / f"{cell.id}.{rank}.et" for rank in range(cell.world_size))
    for rank, path in enumerate(traces):
        path.write_bytes(format_.trace(cell, schedule, rank, groups))

    if groups:
        ranks = {number: schedule.groups[name] for name, number in groups.items()}
        (folder / f"{cell.id}.groups.json").write_text(
            json.dumps(ranks, indent=1) + "\n", encoding="utf-8"
        )

    path = folder / f"{cell.id}.json"
    about = _about(cell, schedule, simulated.records, traces, groups)
    path.write_text(
        json.dumps(about, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    return Exported(traces, path, about)


class Format:
    """The message classes of the schema, made at run time.

    UsageError where protobuf is missing.
    """

    def __init__(self) -> None:
        try:
            from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
        except ImportError as error:
            raise UsageError(
                f"export chakra: {error}; the format needs the package protobuf: pip install "
                "'benchsuite[chakra]'"
            ) from error

        file = descriptor_pb2.FileDescriptorProto(
            name="et_def.proto", package="ChakraProtoMsg", syntax="proto3"
        )
        values = file.enum_type.add(name="NodeType").value
        for number, name in enumerate(NODE_TYPE_NAMES):
            values.add(name=name, number=number)
        of = descriptor_pb2.FieldDescriptorProto

        for message, fields in FIELDS.items():
            made = file.message_type.add(name=message)
            if message == "AttributeProto":
                made.oneof_decl.add(name="value")

            for name, number, kind in fields:
                label = of.LABEL_REPEATED if kind.endswith("[]") else of.LABEL_OPTIONAL
                field = made.field.add(name=name, number=number, label=label)
                kind = kind.removesuffix("[]")

                if kind in FIELDS or kind == "NodeType":
                    field.type = of.TYPE_MESSAGE
                    field.type_name = f".ChakraProtoMsg.{kind}"
                    if kind == "NodeType":
                        field.type = of.TYPE_ENUM
                else:
                    field.type = of.Type.Value(f"TYPE_{kind.upper()}")

                if name.endswith("_val"):
                    field.oneof_index = 0

        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._metadata, self._node = (
            message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ChakraProtoMsg.{name}"))
            for name in ("GlobalMetadata", "Node")
        )

    def trace(self, cell: Cell, schedule: Schedule, rank: int, groups: Mapping[str, str]) -> bytes:
        """The content of one rank's file.

        `groups` maps the comm of a collective to its `pg_name`.
        """
        head = self._metadata(version=VERSION)
        head.attr.add(name="producer", string_val=f"benchsuite {version.VERSION}")
        head.attr.add(name="cell", string_val=cell.label)
        for name, value in (("seed", cell.seed), ("rank", rank), ("num_ranks", cell.world_size)):
            head.attr.add(name=name, int64_val=value)
        messages = [head, *(self._made(event, schedule, groups) for event in schedule.events[rank])]
        return b"".join(
            _delimited(message.SerializeToString(deterministic=True)) for message in messages
        )

    def _made(self, event: Event, schedule: Schedule, groups: Mapping[str, str]) -> Any:
        begin_us = event.begin // NS_PER_US
        end_us = event.end // NS_PER_US
        verb = {"send": "send ", "receive": "receive "}.get(event.kind, "")
        node = self._node(
            id=event.number,
            name=verb + event.name,
            type=NODE_TYPES[event.kind],
            ctrl_deps=event.after,
            data_deps=event.after,
            start_time_micros=begin_us,
            duration_micros=end_us - begin_us,
        )
        add = node.attr.add
        add(name="is_cpu_op", bool_val=False)

        if event.kind in ("send", "receive"):
            ends = (event.rank, event.peer) if event.kind == "send" else (event.peer, event.rank)
            add(name="comm_src", int32_val=ends[0])
            add(name="comm_dst", int32_val=ends[1])
            add(name="comm_size", int64_val=event.num_bytes)
            add(name="comm_tag", int32_val=event.tag)
        elif event.kind == "collective":
            add(name="comm_type", int64_val=COLLECTIVES[event.name])
            add(name="comm_size", int64_val=_put_in(event, schedule))
            add(name="comm_tag", int32_val=event.tag)
            if event.group in groups:
                add(name="pg_name", string_val=groups[event.group])

        add(name="start_ns", uint64_val=event.begin)
        add(name="duration_ns", uint64_val=event.end - event.begin)
        return node


def _put_in(event: Event, schedule: Schedule) -> int:
    """The bytes that one rank gives to a collective.

    ASTRA-sim makes the whole of an all-gather from these (`Ring.cc`).
    """
    return event.num_bytes // (
        len(schedule.groups[event.group]) if event.name == "all_gather" else 1
    )


def _delimited(message: bytes) -> bytes:
    """The message after its length as a varint.

    A varint has seven bits per byte, the lowest first; the eighth bit says that more follow.
    """
    length = bytearray()
    left = len(message)

    while left > 0x7F:
        length.append(left & 0x7F | 0x80)
        left >>= 7

    return bytes([*length, left]) + message


def _about(
    cell: Cell,
    schedule: Schedule,
    records: Sequence[Mapping[str, Any]],
    traces: Sequence[Path],
    groups: Mapping[str, str],
) -> dict[str, Any]:
    """The content of the JSON file.

    AssertionError where the trace does not hold the bytes that the run counted.
    """
    messages = _edges(schedule, control=False)
    tickets = _edges(schedule, control=True)
    counted = Traffic.total(Traffic.from_json(record["traffic"]) for record in records)
    payload = {
        edge: [num_bytes, counted.messages[edge]] for edge, num_bytes in counted.payload.items()
    }
    assert messages == payload, f"sent in the trace {messages}, counted by the run {payload}"
    calls = Counter(
        (event.name, event.num_bytes, groups.get(event.group, ""))
        for events in schedule.events
        for event in events
        if event.kind == "collective" and event.rank == schedule.groups[event.group][0]
    )
    return {
        "format": "Chakra execution trace: mlcommons/chakra schema/protobuf/et_def.proto",
        "cell_id": cell.id,
        "label": cell.label,
        "seed": cell.seed,
        "cell": cell.to_json(),
        "ranks": [
            {
                "rank": rank,
                "role": records[rank]["role"],
                "file": path.name,
                "nodes": len(schedule.events[rank]),
            }
            for rank, path in enumerate(traces)
        ],
        "times": "start_time_micros, duration_micros: us, rounded down; attributes start_ns, "
        "duration_ns: ns, exact",
        "end_ns": schedule.end,
        "messages": [[*edge, *both] for edge, both in sorted(messages.items())],
        "tickets": [[*edge, *both] for edge, both in sorted(tickets.items())],
        "collectives": [[*call, times] for call, times in sorted(calls.items())],
        "derived": records[0]["derived_total"],
        "columns": {
            "messages, tickets": "source, destination, bytes, messages",
            "collectives": "name, bytes of the whole vector, pg_name, calls",
            "derived": "bytes and messages of the collectives by edge, as the run derives them",
        },
        "unreceived": [
            [event.rank, event.peer, event.num_bytes, event.tag] for event in schedule.unreceived
        ],
        "left_out": LEFT_OUT,
    }


def _edges(schedule: Schedule, *, control: bool) -> dict[Edge, list[int]]:
    """(source, destination) -> [bytes, messages] of everything that was sent."""
    found: dict[Edge, list[int]] = {}

    for events in schedule.events:
        for event in events:
            if event.kind == "send" and event.control == control:
                edge = found.setdefault((event.rank, event.peer), [0, 0])
                edge[0] += event.num_bytes
                edge[1] += 1

    return found
