"""The exercises' programs: small real HTTP servers, standard library only.

Each module is one program, run as `python -m nodeagent.lab.apps.NAME`. They know nothing of the
mesh: what they say about it can only be what they see.
"""
