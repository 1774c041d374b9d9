"""Export."""


def export(*a, **k): ...
