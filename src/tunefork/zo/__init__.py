"""Zeroth-order fine-tuning: train in the memory it takes to run. Imports nothing else of this package."""

from tunefork.zo.calibrate import Calibration
from tunefork.zo.directions import release
from tunefork.zo.engine import Step
from tunefork.zo.measured import Objective
from tunefork.zo.optimizer import ZO
from tunefork.zo.options import Options, Preset, options_of, presets
from tunefork.zo.rows import Rows, TensorRows
from tunefork.zo.trainer import ZOTrainerMixin
from tunefork.zo.trajectory import Header, Reader, Record, Trajectory, TrajectoryError, replay

__all__ = [
    "ZO",
    "Calibration",
    "Header",
    "Objective",
    "Options",
    "Preset",
    "Reader",
    "Record",
    "Rows",
    "Step",
    "TensorRows",
    "Trajectory",
    "TrajectoryError",
    "ZOTrainerMixin",
    "options_of",
    "presets",
    "release",
    "replay",
]
