"""Turns a shipped file into a torch module or function that computes the same; other runtimes' converters start from it."""

from __future__ import annotations

from toolchain.interpreter.graph import GraphModule, graph_of, module_of, traced

__all__ = ["GraphModule", "graph_of", "module_of", "traced"]
