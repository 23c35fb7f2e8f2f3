"""What a member declares of itself: the vocabulary of literal class attributes, one class per kind.

A member (a strategy, a topology, a compression ..) says in its own file what goes with it, what it
refuses and why, how it is labelled and coloured. The declarations are plain class attributes with
literal values, read from the source without importing it (`benchsuite/plan/plugins.py`). Rules,
reports and the assembly of runs know members by these declarations only, never by name, so that a
user's file by path is an equal of a member that ships with the suite:

    class Strategy:
        label = "pairwise mean"
        topologies = ("graph",)
        topologies_why = "it mixes with the neighbours of a graph"
        refuses = (
            {
                "rule": "rate",
                "when": "not 0 < rate <= 1",
                "reason": "rate = {rate:g}: 0 < rate <= 1 is needed",
                "remedy": "set rate = 1",
            },
        )

Every attribute has a default, every value is checked when it is read: one that the vocabulary does
not allow is a PluginError that names file, value and what is allowed. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from benchsuite.plan import conditions, plugins
from benchsuite.plan.plugins import Plugin, PluginError

LAST = 100  # order of a member that does not say where it stands in lists
COLLECTIVE = "collective"
SERVER = "server"
GRAPH = "graph"
TOPOLOGY_KINDS = (COLLECTIVE, SERVER, GRAPH)


@dataclass(frozen=True)
class Refusal:
    """One entry of `refuses`: a condition under which the member is not run, and what to say.

    `when` and the fields of `reason` and `remedy` are expressions (`benchsuite/plan/conditions.py`)
    over these names: the member's own options; `name`, its own name; `cell.FIELD`, a field of the
    cell (also `cell.num_workers`, `cell.num_servers`, `cell.world_size` and `cell.steps`, the
    budget in steps); `AXIS.X` with AXIS one of workload, parallel, sync, topology, compression, and
    X `name`, an option or a declaration of the member on that axis; `default.FIELD`, what a cell
    has where nothing is said. A condition that needs a number that is not known does not hold.
    """

    rule: str  # short name of the rule, e.g. "moving rate"
    when: conditions.Expression
    reason: conditions.Sentence
    remedy: conditions.Sentence


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a member of any kind may declare."""

    label: str = ""
    """How reports write its name; "" = the file's name with spaces for underscores."""

    short_label: str = ""
    """The same where there is little room; "" = the label."""

    order: int = LAST
    """Where it stands in lists of members: small numbers first, then by name."""

    later: tuple[str, ...] = ()
    """Options that came after the first stored runs: absent from a cell where they are default."""

    timing_free: bool = False
    """Parameters do not depend on who is fast, so a cell is trained once and only timed again."""

    smallest_replicas: int = 1
    """The least number of replicas that it makes sense with."""

    at_least: Mapping[str, int] = field(default_factory=dict)
    """Options with the least value that each may have."""

    wall_only: str = ""
    """Why it cannot run under the virtual clock; "" = it can."""

    simulate_instead: str = ""
    """The member to simulate where this one is `wall_only`; "" = the one of a plain cell."""

    refuses: tuple[Refusal, ...] = ()
    """Conditions under which it is not run, each with its reason and remedy."""


@dataclass(frozen=True, kw_only=True)
class Strategy(Declared):
    """What a file in `sync/` may declare."""

    topologies: tuple[str, ...] = ()
    """Kinds of topology (collective, server, graph) or names that it goes with; () = all that can
    take a mean: collectives and servers."""

    topologies_why: str = ""
    """The reason, said where another topology is asked for: a sentence as those of `refuses`."""

    needs_topology: tuple[str, ...] = ()
    """Names of topologies only: an older way to say `topologies`."""

    model_parallel: bool = True
    """Whether its replicas may be divided over several ranks."""

    by_arrival: bool = False
    """Updates are applied in the order of arrival, so that no two real runs are the same."""

    answers_at_once: bool = False
    """Its servers answer each push at once, so that their log tells a whole run."""

    every_step: bool = False
    """Replicas agree in every step, so that one process would do the same."""

    lag_by_one: bool = False
    """The update of a step is applied after the next step has begun."""

    takes_votes: bool = True
    """All replicas' votes of a step come together, as a majority needs."""

    agrees_after: str = ""
    """The option that counts the local steps between two agreements; a run ends with one."""

    refuses_compression: str = ""
    """Why there is nothing that a compression could act on; "" = there is."""

    compressions: tuple[str, ...] = ()
    """Names of the compressions that it takes; () = any."""

    compressions_why: str = ""
    """The reason, said where another compression is asked for."""

    compresses_over: tuple[str, ...] = TOPOLOGY_KINDS
    """Kinds of topology over which what it sends may be compressed."""

    cpu_only: bool = False
    """It works on the host's memory."""

    label_with_topology: str = ""
    """The label of strategy and topology together, where the strategy's name says both."""

    short_label_with_topology: str = ""
    """The same where there is little room."""

    colour: int | str = ""
    """How figures draw it: a place in their palette (0 to 9) or `#rrggbb`; "" = a free one."""

    compressed_colour: int | str = ""
    """The same with a compression; "" = a free one."""

    looks: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """Topology -> places of colour, mark and dashes, where figures have fixed ones. With looks for
    several topologies, series over all others take free colours."""

    survives: Literal["none", "worker"] = "none"
    """Whose loss does not end the run."""

    snapshot_of: Literal["", "replica", "servers", "mean"] = ""
    """Whose parameters count: any replica's, the servers' slices or the mean over replicas."""

    clips_mean: bool = False
    """Whether clipping acts on the mean gradient or on each worker's."""

    goes_on: bool = False
    """Replicas differ, so one that diverges goes on to the end of the budget."""

    apart: bool = False
    """Workers do not step together: batches are handed out."""

    alone_is_plain: bool = True
    """One worker alone does what the plain loop does."""

    calls_library: bool = False
    """It calls a library that communicates past `Comm`."""

    payload_source: Literal["", "counted", "derived"] = ""
    """Where its bytes come from; "" = its topology says it."""

    state_is_a_bound: bool = False
    """Predicted memory is an upper bound."""

    blocked_reason: str = ""
    """What the blocked time is made of, where it is not the wait for messages."""


@dataclass(frozen=True, kw_only=True)
class Topology(Declared):
    """What a file in `topology/` may declare."""

    kind: Literal["", "collective", "server", "graph"] = ""
    """Who talks to whom: all ranks enter one mean, workers and servers, or neighbours of a graph.
    "" = not said: it is taken for a collective and for a graph, never for a server."""

    called: str = "such a topology"
    """What a sentence calls it that says why a strategy does not go with it."""

    all_to_all: bool = False
    """A mean takes 2 N (N-1) messages."""

    by_host: bool = False
    """What is added first depends on who shares a host."""

    owns_buffer: bool = False
    """A gradient that lives in its buffer is reduced where it is."""

    payload_source: Literal["", "counted", "derived"] = ""
    """Where its bytes come from: our own sends, or calls of the library."""


@dataclass(frozen=True, kw_only=True)
class Compression(Declared):
    """What a file in `compression/` may declare."""

    travels_over: tuple[str, ...] = ()
    """Kinds of topology or names over which its vectors may travel; () = all."""

    travels_why: str = ""
    """The reason, said where another topology is asked for."""

    feedback: bool = False
    """It keeps what was not sent for the next vector."""


@dataclass(frozen=True, kw_only=True)
class Parallel(Declared):
    """What a file in `parallel/` may declare."""

    colour: int | str = ""
    """How figures draw it: a place in their palette (0 to 9) or `#rrggbb`; "" = a free one."""

    marks: tuple[str, ...] = ()
    """Two marks of matplotlib: of one replica, and of several; () = free ones."""

    divides: bool = False
    """Several ranks hold one replica."""

    stages: bool = False
    """Parts are stages of a pipeline, with a schedule of micro-batches."""

    splits_weights: bool = False
    """Parts hold slices of each layer's weights, as the workload's `tensor_divides` says."""

    holds_slices: bool = False
    """A rank holds slices of matrices, never a whole one."""

    divides_batch: bool = False
    """The parts of a replica share its batch among themselves."""

    autocast: bool = False
    """Forward and loss run under autocast where bfloat16 is asked for."""

    acts_whole: bool = False
    """Parameters are gathered once for a rollout."""

    several_chunks: Mapping[str, int] = field(default_factory=dict)
    """Schedules with several runs of layers on each stage, and how many where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Workload(Declared):
    """What a file in `workloads/` may declare."""

    collects: bool = False
    """Its batches come from acting in environments."""

    tensor_divides: tuple[str | int, ...] = ()
    """Options or numbers that the parts of a tensor-parallel replica have to divide."""

    tensor_tokens: str = ""
    """The option that counts the tokens of a sequence."""

    trained_layers: int = 0
    """Layers of the chain that have parameters; 0 = all."""

    layers_beside: Mapping[str, int] = field(default_factory=dict)
    """`{"blocks": 2}`: the chain has as many layers as the option says, and two more."""


@dataclass(frozen=True, kw_only=True)
class Cluster(Declared):
    """What a file in `cluster/` may declare, to the rules and to whoever starts cells."""

    started_by: str = ""
    """How the user starts the ranks, as a command; "" = the engine starts them itself."""

    several_hosts: bool = False
    """It has ranks on more than this machine."""

    shapes_links: bool = False
    """It makes links as slow as the cell says."""

    flags: Mapping[str, str] = field(default_factory=dict)
    """Flags of the command line that the engine takes, each with its line of help.

    `flags = {"account": "whose time it is"}` makes `--account X` a flag of every command that names
    this engine with `--cluster`; the class is then called as `Cluster(account="X")`.
    """

    processes: tuple[str, ...] = ()
    """Modules of the suite that run as processes of their own, beside the ranks.

    A cell's runs are missing again when one of them changes, as when the engine's file does.
    """


KINDS: Mapping[str, type[Declared]] = MappingProxyType(
    {
        "workload": Workload,
        "parallel": Parallel,
        "sync": Strategy,
        "topology": Topology,
        "compression": Compression,
        "cluster": Cluster,
    }
)


def of(kind: str, reference: str) -> Declared:
    """What a member declares, found by name or by path.

    kind: workload, parallel, sync, topology, compression or cluster. Raises PluginError where there
    is no such member, or where it declares a value that the vocabulary does not allow.
    """
    plugin = plugins.find(kind, reference)
    # The resolved path: a relative one would lead elsewhere after a change of folder, with the same
    # key of the cache.
    reference = str(plugin.path) if plugin.given_by_path else plugin.name
    return _of(kind, reference, plugin.digest)


def strategy(reference: str) -> Strategy:
    """`of` a sync strategy, in its own type. PluginError as there."""
    return cast(Strategy, of("sync", reference))


def cluster(reference: str) -> Cluster:
    """`of` a cluster engine, in its own type."""
    return cast(Cluster, of("cluster", reference))


def topology(reference: str) -> Topology:
    """`of` a topology, in its own type. PluginError as there."""
    return cast(Topology, of("topology", reference))


@lru_cache(maxsize=1024)
def _of(kind: str, reference: str, digest: str) -> Declared:
    """`of` for a file of known content, kept: a plan asks for the same members once per cell."""
    del digest  # part of the cache key only: a file that was edited is read anew
    return read(plugins.find(kind, reference))


def read(plugin: Plugin) -> Declared:
    """The declarations of a file, checked; what it does not say has its default.

    Attributes that the vocabulary does not know are the member's own business. Raises PluginError.
    """
    vocabulary = KINDS[plugin.kind]
    # The annotations are text (`from __future__`), which this turns into types.
    hints = typing.get_type_hints(vocabulary)
    values: dict[str, Any] = {}

    for each in dataclasses.fields(vocabulary):
        if each.name in plugin.constants:
            values[each.name] = _checked(plugin, each.name, hints[each.name])

    return vocabulary(**values)


def members(kind: str) -> tuple[str, ...]:
    """Names of the members that ship with the suite, in the order that they declare.

    Those of equal order follow by name. kind: as for `of`.
    """
    folder = plugins.KINDS[kind][0]
    return _members(kind, folder, folder.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _members(kind: str, folder: Path, mtime_ns: int) -> tuple[str, ...]:
    """`members` for a folder of known age."""
    del folder, mtime_ns  # parts of the cache key only: a folder with a new file is read anew
    return tuple(sorted(plugins.names(kind), key=lambda name: (of(kind, name).order, name)))


def labels(name: str, *, short: bool = False) -> str:
    """How reports write a member's name, whatever its kind.

    short: for narrow columns; the long label where there is no short one. Any other word is written
    as it is, with spaces for underscores, so that every value of a table can be passed.
    """
    for kind in KINDS:
        found = by_stem(kind, name)
        if found is not None and (found.label or (short and found.short_label)):
            return (found.short_label if short else "") or found.label
    return name.replace("_", " ")


def where_known(kind: str, reference: str) -> Declared | None:
    """`of` a member of a stored run, whose file may be gone since: then None.

    A report of old runs is drawn all the same, with plain labels.
    """
    try:
        return of(kind, reference)
    except PluginError:
        return None


def label_with_topology(name: str, *, short: bool = False) -> str:
    """The label of a strategy and its topology together; "" = each has its own.

    name: of the strategy. short: for narrow columns.
    """
    says = by_stem("sync", name)

    if not isinstance(says, Strategy):
        return ""
    return (says.short_label_with_topology if short else "") or says.label_with_topology


# Files given by path, by the stem that reports write: kind, stem -> path. Filled by `seen`.
_SEEN: dict[tuple[str, str], str] = {}


def seen(kind: str, reference: str) -> None:
    """Notes where a user's file is, so that reports find its label and colour by its stem.

    Reports call a user's file so, because a path of another machine says nothing.
    """
    if plugins.is_path(reference):
        _SEEN[kind, plugins.stem(reference)] = reference


def by_stem(kind: str, name: str) -> Declared | None:
    """The declarations of a member that reports call by its stem; None where no file is known.

    A user's file is known where a cell that names its path was described before (`seen`). Of two
    such files with one stem the later one counts.
    """
    reference = _SEEN.get((kind, name), name)
    # Asked of the disk first: a run of a user's file that was never seen is no error.
    if reference == name and not (plugins.KINDS[kind][0] / f"{name}.py").is_file():
        return None
    return where_known(kind, reference)


# -- checking a value against the vocabulary --------------------------------------------------


def _checked(plugin: Plugin, name: str, hint: Any) -> Any:
    """The declared value in the type that the vocabulary asks for.

    hint: that type. Raises PluginError with the file, the value and what is allowed. A wrong value
    found here costs a line on the screen; found later, it would be a run with a rule that never
    fired.
    """
    value = plugin.constants[name]

    # A table of its own shape, with a check of its own.
    if name == "refuses":
        return tuple(_refusals(plugin, value))

    if name == "needs_topology" and isinstance(value, str):
        value = (value,)

    if typing.get_origin(hint) is Literal:
        # "" says "not declared", and is not offered as a choice.
        allowed = [each for each in typing.get_args(hint) if each]
        if value not in typing.get_args(hint):
            raise PluginError(
                f"{plugin.path}: {plugins.unknown(f'value of {name}', value, allowed)}"
            )
    elif not _fits(value, hint):
        raise PluginError(f"{plugin.path}: {name} = {value!r}: {_EXPECTED[name, hint]} is needed")

    # From here on the type is right, and what the value refers to has to exist.
    if name.endswith("colour") and not _is_colour(value):
        raise PluginError(
            f"{plugin.path}: {name} = {value!r}: a place in the palette, 0 to 9, or a text like "
            "'#0173b2' is needed"
        )

    if name == "at_least":
        _known_options(plugin, name, value)
    if name == "topologies_why":
        _known_sentence(plugin, name, value)
    if name in ("topologies", "travels_over"):
        _known_topologies(plugin, name, value)
    return value


class _Expected(dict[tuple[str, Any], str]):
    """What a value of a type looks like, in words."""

    def __missing__(self, key: tuple[str, Any]) -> str:
        """Puts the words together for a name and a type that nobody has asked for before."""
        name, hint = key
        words = {bool: "True or False", int: "an integer", str: "a text"}
        if hint in words:
            return words[hint]
        if typing.get_origin(hint) is tuple:
            return f'a tuple of texts, e.g. {name} = ("ring",),'
        return f'a table, e.g. {name} = {{"name": 1}},'


_EXPECTED = _Expected()


def _fits(value: Any, hint: Any) -> bool:
    """Whether a literal has a type of the vocabulary: a plain one, a union, a tuple, a mapping."""
    arguments = typing.get_args(hint)

    origin = typing.get_origin(hint)
    if origin is None:
        # True is an int for Python; in a file it is a mistake for one.
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))

    if origin is tuple and arguments[-1] is Ellipsis:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)

    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(map(_fits, value, arguments))
        )

    if origin is _MAPPING:
        key_hint, value_hint = arguments
        return (
            isinstance(value, Mapping)
            and all(_fits(key, key_hint) for key in value)
            and all(_fits(each, value_hint) for each in value.values())
        )

    return any(_fits(value, each) for each in arguments)  # a union


# What `get_origin` gives for the annotation `Mapping[..]`: the abstract class, not typing's.
_MAPPING = typing.get_origin(Mapping[str, int])


def _is_colour(value: int | str) -> bool:
    """Whether a value is a place in the palette or `#rrggbb`."""
    if isinstance(value, int):
        return 0 <= value <= 9
    return re.fullmatch("#[0-9a-fA-F]{6}", value) is not None


def _known_options(plugin: Plugin, name: str, options: Iterable[str]) -> None:
    """PluginError for an option that the member does not have: its limit would hold for nothing."""
    for option in options:
        if option not in plugin.options:
            raise PluginError(
                f"{plugin.path}: {name}: "
                + plugins.unknown("option", option, plugin.options, of=plugin.name)
            )


def _known_topologies(plugin: Plugin, name: str, values: Iterable[str]) -> None:
    """A kind, or the name of a topology. A user's own is meant by its kind."""
    allowed = (*TOPOLOGY_KINDS, *plugins.names("topology"))
    for value in values:
        if value not in allowed:
            raise PluginError(
                f"{plugin.path}: {plugins.unknown(f'value of {name}', value, allowed)}"
            )


def _known_sentence(plugin: Plugin, name: str, text: str) -> None:
    """PluginError where a sentence cannot be put together, with the field that is wrong."""
    try:
        conditions.sentence(text)
    except ValueError as error:
        raise PluginError(f"{plugin.path}: {name}: {error}") from error


_REFUSAL_KEYS = ("rule", "when", "reason", "remedy")


def _refusals(plugin: Plugin, table: Any) -> Iterator[Refusal]:
    """The entries of `refuses`, each parsed now, so that a mistake shows without a cell that meets
    it.

    Raises PluginError for another shape, another key, a name that the member does not have.
    """
    if not isinstance(table, tuple) or not all(isinstance(each, Mapping) for each in table):
        raise PluginError(
            f"{plugin.path}: refuses = {table!r}: a tuple of tables with the keys "
            f"{', '.join(_REFUSAL_KEYS)} is needed"
        )

    for each in table:
        if set(each) != set(_REFUSAL_KEYS) or not all(isinstance(v, str) for v in each.values()):
            raise PluginError(
                f"{plugin.path}: refuses has an entry {dict(each)!r}: it needs exactly the keys "
                f"{', '.join(_REFUSAL_KEYS)}, each with a text"
            )

        try:
            refusal = Refusal(
                rule=each["rule"],
                when=conditions.expression(each["when"]),
                reason=conditions.sentence(each["reason"]),
                remedy=conditions.sentence(each["remedy"]),
            )
        except ValueError as error:
            raise PluginError(f"{plugin.path}: refuses {each['rule']!r}: {error}") from error

        # A misspelt option would never be known, and a condition over it never hold: the rule would
        # be off, without a word.
        for owner, attribute in names_in(refusal):
            if not attribute and owner != "name" and owner not in plugin.options:
                known = ("name", *plugin.options)
                raise PluginError(
                    f"{plugin.path}: refuses {each['rule']!r}: "
                    + plugins.unknown("name", owner, known, of=plugin.name)
                )

        yield refusal


def names_in(refusal: Refusal) -> Iterator[tuple[str, str]]:
    """Every name that a refusal looks up, `cell.replicas` as ("cell", "replicas").

    Of its condition first, then of its two sentences; a name may come several times.
    """
    yield from refusal.when.names
    for sentence in (refusal.reason, refusal.remedy):
        for _, expression, _ in sentence.parts:
            if expression is not None:
                yield from expression.names
