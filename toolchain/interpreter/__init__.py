"""A file that ships as a torch module that computes what the file says: what other runtimes' converters start from."""

from __future__ import annotations

from toolchain.interpreter.graph import GraphModule, graph_of, module_of

__all__ = ["GraphModule", "graph_of", "module_of"]
