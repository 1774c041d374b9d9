"""Answers: how a model is asked, what is in memory, and which rows are computed together."""
