"""The way out of a service: what there is, what it says, the same on one's own machine, and how the two compare."""

from tunefork.migrate.record import Recording, read_recording, record

__all__ = ["Recording", "read_recording", "record"]
