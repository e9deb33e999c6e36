"""The benchmark: our pair of tunnels beside no mesh, Envoy, and bare relays.

This package owns what `make bench` measures and prints. It promises that every subject meets the
same network, programs and settings, that no traffic leaves namespaces of its own, and that they are
gone afterwards. It uses the lab and the daemons as anybody would.
"""
