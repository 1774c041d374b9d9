"""Keeping a trained model in a form that other tools load: merged, with a proof, or as an adapter."""
