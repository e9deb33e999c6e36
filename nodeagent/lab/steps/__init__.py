"""The exercises, step by step: what `nodeagent lab exercise` does in a lab of its own.

This package owns the steps of each exercise and its manifests, which are applied as an operator
would. It promises that each thing said about a step was checked in that very run, with real calls
and against what the daemons themselves report. It may not know how a lab is built.
"""

from nodeagent.lab.steps.exercise import Done, Exercise
from nodeagent.lab.steps.rollout import Rollout
from nodeagent.lab.steps.sentences import MutualTls

__all__ = ["EXERCISES", "Done", "Exercise", "MutualTls", "Rollout"]

EXERCISES = {exercise.LAB: exercise for exercise in (Rollout, MutualTls)}
"""By the name of the lab that they are done in."""
