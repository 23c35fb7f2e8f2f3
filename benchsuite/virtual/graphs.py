"""Gradients of a group as one traced graph, made cheap to replay.

Small groups spend more time on calls than on sums. `trace`: `vmap(grad)` of a loss, recorded
operator by operator (make_fx). `lean`: what is computed twice is computed once, views of views
become one view, views that change nothing are left out, gradients of weights are multiplied the
right way round, and operators are called as tensor methods, whose binding costs a third of an
`OpOverload`'s. Which sums are formed stays the same (`gradients.py` holds every graph against the
module).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # parameters (P,), x, y -> a scalar

_ops: Any = torch.ops.aten
_VIEWS = (_ops.view.default, _ops._unsafe_view.default)
_NO_OPS = (_ops.detach.default, _ops.alias.default)
# Tensor methods that take an operator's arguments as they are.
METHODS = frozenset(
    {
        "add",
        "addmm",
        "baddbmm",
        "bmm",
        "clamp_min",
        "clone",
        "div",
        "expand",
        "mm",
        "mul",
        "ne",
        "neg",
        "permute",
        "pow",
        "reciprocal_",
        "relu",
        "split_with_sizes",
        "squeeze",
        "sub",
        "sum",
        "t",
        "tanh",
        "transpose",
        "unsqueeze",
        "unsqueeze_",
        "view",
    }
)


@dataclass(frozen=True)
class Graph:
    """A traced gradient of a group of k rows.

    run: parameters (k, P), or (P,) where all rows share them, x, y (k, ..), grads (N, P), rows (k,)
    -> losses (k,). The gradients of the group go into these rows of `grads`.
    """

    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    num_calls: int


def trace(loss: Loss, given: Tensor, x: Tensor, y: Tensor) -> Graph:
    """The graph of the gradients of `loss` for groups of this size.

    Raises whatever vmap raises where it cannot batch the loss.
    """
    # Parameters that all rows share are not batched.
    params_dim = None if given.dim() == 1 else 0
    batched = vmap(grad_and_value(loss), in_dims=(params_dim, 0, 0))
    made = lean(make_fx(lambda p, x, y: batched(p, x, y))(given, x, y))
    num_calls = sum(node.op.startswith("call") for node in made.graph.nodes)

    return Graph(_into_rows(made).forward, num_calls)


class CountCalls(TorchDispatchMode):
    """Counts how many operators a piece of code calls, its backward pass included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def lean(traced: fx.GraphModule) -> fx.GraphModule:
    """The same function with fewer and cheaper calls.

    traced: made by `make_fx`; it is consumed.
    """
    graph = traced.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    for node in calls:
        _out_of_place(node)
    graph.eliminate_dead_code()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    for node in calls:
        _shorten(node)
    if not any(_is_mutable(node) for node in calls):
        _compute_once(graph)
    for node in [node for node in graph.nodes if node.target is _ops.transpose.int]:
        _multiply_transposed(graph, node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name.partition("::")[2]
            if name == "_unsafe_view":
                name = "view"
            if name in METHODS and node.args and isinstance(node.args[0], fx.Node):
                node.op = "call_method"
                node.target = name

    return fx.GraphModule(traced, graph)


def _into_rows(made: fx.GraphModule) -> fx.GraphModule:
    """The graph with two more arguments, `grads` and `rows`, into which it writes.

    Each piece of a gradient is copied as soon as it is there. One vector put together at the end
    would be read and written twice, from memory that no cache holds any more.
    """
    graph = made.graph
    (end,) = (node for node in graph.nodes if node.op == "output")
    gradients, losses = end.args[0]
    pieces = [gradients]
    if gradients.target is _ops.cat.default and tuple(gradients.args[1:]) == (1,):
        pieces = list(gradients.args[0])
    *_, last = (node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(last):
        # Each goes right behind `last`, so the second one stands first.
        rows = graph.placeholder("rows")
        grads = graph.placeholder("grads")

    end.args = (losses,)
    if gradients not in pieces and not gradients.users:
        graph.erase_node(gradients)
    begin = 0
    for piece in pieces:
        # The operator that made the piece, without the views around it, is followed by the copy.
        made_by = piece
        width = _shape(piece)[1]
        while made_by.target in ("view", *_VIEWS):
            made_by = made_by.args[0]
        with graph.inserting_after(made_by):
            place = graph.call_method("narrow", (grads, 1, begin, width))
        with graph.inserting_after(place):
            flat = graph.call_method("view", (made_by, (-1, width)))
        with graph.inserting_after(flat):
            graph.call_method("index_copy_", (place, 0, rows, flat))
        begin += width
        if made_by is not piece and not piece.users:
            graph.erase_node(piece)

    return fx.GraphModule(made, graph)


def _is_mutable(node: fx.Node) -> bool:
    """Whether an operator changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _out_of_place(node: fx.Node) -> None:
    """Puts the form that changes nothing in the place of an operator that works in place.

    Only where it changes a fresh result that nobody else reads.
    """
    source: Any = node.args[0] if node.args else None
    if not _is_mutable(node) or not isinstance(source, fx.Node) or set(source.users) != {node}:
        return

    made = source.target
    # A result is fresh where it shares no memory with an argument.
    fresh = isinstance(made, torch._ops.OpOverload) and all(
        r.alias_info is None for r in made._schema.returns
    )
    operator: Any = node.target
    name = operator._schema.name.partition("::")[2]
    if fresh and name.endswith("_") and hasattr(_ops, name[:-1]):
        node.target = getattr(getattr(_ops, name[:-1]), operator._overloadname)


def _compute_once(graph: fx.Graph) -> None:
    """Makes equal operators on equal arguments one; none of the graph's may work in place."""
    # (operator, arguments, keyword arguments) -> the first node that computes it
    computed: dict[tuple[Any, str, str], fx.Node] = {}

    for node in list(graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(
            node.target, "tags", ()
        ):
            continue

        first = computed.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _multiply_transposed(graph: fx.Graph, node: fx.Node) -> None:
    """Computes (A B)^T as B^T A^T, which lies in memory row after row.

    Copying it transposed took a fifth of the digits CNN's gradient.
    """
    product: Any = node.args[0]  # (k, rows, columns)
    dims: Any = node.args[1:3]

    if (
        product.target is not _ops.bmm.default
        or set(product.users) != {node}
        or {dim % 3 for dim in dims} != {1, 2}
    ):
        return

    with graph.inserting_before(node):
        left, right = (
            graph.call_function(_ops.transpose.int, (each, 1, 2)) for each in reversed(product.args)
        )
        swapped = graph.call_function(_ops.bmm.default, (left, right))

    node.replace_all_uses_with(swapped)


def _shorten(node: fx.Node) -> None:
    """Leaves out a view that changes nothing, and makes a view of views one view."""
    source: Any = node.args[0] if node.args else None
    if any(_changes(user, node) for user in node.users):
        return  # without the view, its source would be changed in place
    if node.target in _NO_OPS:
        node.replace_all_uses_with(source)
    elif node.target in _VIEWS:
        while source.op == "call_function" and source.target in _VIEWS:
            source = source.args[0]
        node.args = (source, *node.args[1:])
        if _shape(source) == _shape(node):
            node.replace_all_uses_with(source)
    elif _changes_nothing(node, source):
        node.replace_all_uses_with(source)


def _changes_nothing(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator gives back its first argument as it is."""
    if node.target is _ops.permute.default:
        order: Any = node.args[1]
        return list(order) == sorted(order)

    return node.target is _ops.expand.default and _shape(source) == _shape(node)


def _changes(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operator works in place on its first argument, and that is `node`."""
    return _is_mutable(user) and bool(user.args) and user.args[0] is node


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape that a node's result had when it was traced."""
    return tuple(node.meta["val"].shape)
