from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    seconds: float | None = None
    memory_bytes: int = 0
def forecast(job): return Forecast()
