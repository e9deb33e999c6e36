"""What the tunnel tells of its connections: log lines, metrics, statistics, flows, traces.

This package owns counting and telling. It promises that nothing in it decides about a connection,
and that what peers and policies can make many of is bounded and counted where it is left out. It
may not hold up who judges or who moves bytes.
"""
