"""The run as a file: an append-only log of what each step added, from which it can be done again bit for bit."""

from tunefork.zo.trajectory.format import Header, Record, TrajectoryError, digest, environment
from tunefork.zo.trajectory.log import Reader, Trajectory
from tunefork.zo.trajectory.replay import replay

__all__ = [
    "Header",
    "Reader",
    "Record",
    "Trajectory",
    "TrajectoryError",
    "digest",
    "environment",
    "replay",
]
