"""ztunnel: decides each connection of this node's pods, and carries it.

This package owns the judgement of connections (Python) and the data path (C, `_core`). It promises
to serve, new connections included, on the last state while `nodeagent` is away. It may import
nothing from `nodeagent`.
"""
