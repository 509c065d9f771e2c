"""Changes a chat template's tree so that it pays from the budget while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jinja2.visitor
from jinja2 import nodes

from mmmamba.data.jinja_budget import ITEM


class MeteredTree(jinja2.visitor.NodeTransformer):
    """Changes a tree so that each pass of a loop, each call of a macro, and each value that grows pays."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._body(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._body(node)

    def _body(self, node: Any) -> nodes.Node:
        weight = ITEM
        for inside in _within(node):
            weight += len(inside.data) if isinstance(inside, nodes.TemplateData) else 1
        node = self.generic_visit(node)
        pay = environment_call("charge", nodes.Const(weight))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(pay, node.test)
        node.body = [nodes.ExprStmt(pay), *node.body]
        return node

    def visit_Concat(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        return environment_call("concatenated", *node.nodes)

    def visit_Tuple(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        return environment_call("checked", node) if node.ctx == "load" and node.items else node

    def visit_Getitem(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return environment_call("cut", node.node, *(nodes.Const(None) if end is None else end for end in ends))

    def visit_Compare(self, node: Any) -> nodes.Node:
        node = self.generic_visit(node)
        node.expr = _known(node.expr)
        for operand in node.ops:
            operand.expr = _known(operand.expr)
        return node


def _within(node: nodes.Node) -> Iterable[nodes.Node]:
    """The nodes that run once for each pass of ``node``. An inner loop pays for its own body."""
    for child in node.iter_child_nodes():
        yield child
        if not isinstance(child, (nodes.For, nodes.Macro, nodes.CallBlock)):
            yield from _within(child)


def _known(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else environment_call("checked", node)


def environment_call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)
