"""What this node has seen, put together for people: who talks to whom, and how.

This package owns the answers that are made of recorded flows and of what is known of the mesh. It
promises that every number comes from traffic that was counted and none from configuration, that
each answer is bounded and says when something was left out, and that its types' fields are only
added to. It is pure: values in, values out.
"""
