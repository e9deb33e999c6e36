"""nodeagent: decides what should be on this node, and never touches the data path.

This package owns configuration, identities, policy, capture and administration. It promises that
ztunnel can serve without it on the last state it was given. Of `ztunnel` it may import only
`ztunnel.protocol`, the seam, and `ztunnel.spiffe`.
"""
