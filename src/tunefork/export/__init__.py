"""Keeping a trained model in a form that other tools load: merged, with a proof, or as an adapter."""

from tunefork.export.exporting import Exported, export
from tunefork.export.proof import LIMIT, Proof

__all__ = ["LIMIT", "Exported", "Proof", "export"]
