"""How answers are computed together here, beside transformers' continuous batching, on the embedded model.

python benchmarks/continuous_batching.py [--json]

No HTTP on either side: prompts of ids go in, and tokens come back one by one, greedy, in fp32. Answers are as long as
the scene says, or from an eighth of that to all of it. The last scene is 15 long answers, and a short one that arrives
while they are being written.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from tunefork.models import choose_device, inspect_model, load_base
from tunefork.recipe import ModelSection
from tunefork.server import Settings
from tunefork.server.inference.engine import Engine, Voice
from tunefork.server.inference.rows import Piece, Row, Sampling
from tunefork.server.models import Served

SCENES = [  # answers, tokens of their prompts, tokens of each, whether they differ
    (1, 40, 32, False),
    (16, 40, 32, False),
    (64, 40, 32, False),
    (16, 20, 32, True),
    (64, 20, 32, True),
    (16, 200, 32, True),
    (16, 40, 192, True),
    (1, 200, 192, False),
]
LONG, LATE = (15, 40, 256), (1, 60, 32)
NEVER = -1  # an end token that no model has
Prompts = Sequence[Sequence[int]]
Measure = Callable[[Prompts, Sequence[int]], Awaitable[tuple[float, float]]]
"""(prompts, tokens of each answer) -> seconds until all have ended, and the median until the first token."""


class Clock:
    """Of one round of answers."""

    def __init__(self, rows: int) -> None:
        self.started, self.first, self.left = time.perf_counter(), dict[int, float](), rows
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()

    def hear(self, row: int, ended: bool) -> None:
        self.first.setdefault(row, time.perf_counter() - self.started)
        self.left -= ended
        if not self.left:
            self.loop.call_soon_threadsafe(self.over.set)

    async def told(self) -> tuple[float, float]:
        await self.over.wait()
        return time.perf_counter() - self.started, statistics.median(self.first.values())


def ours(engine: Engine, voice: Voice) -> Measure:
    async def measure(prompts: Prompts, tokens: Sequence[int]) -> tuple[float, float]:
        clock = Clock(len(prompts))

        def listener(number: int) -> Callable[[Piece], None]:
            return lambda piece: clock.hear(number, piece.finish is not None)

        rows = [
            Row(prompt, Sampling(longest=length, seed=0, temperature=0.0), voice.tokenizer, (NEVER,), listener(number))
            for number, (prompt, length) in enumerate(zip(prompts, tokens, strict=True))
        ]
        engine.submit(rows, voice, voice.renderer("chat"))
        return await clock.told()

    return measure


def theirs(manager: Any) -> Measure:
    names = (f"answer-{n}" for n in itertools.count())

    async def measure(prompts: Prompts, tokens: Sequence[int]) -> tuple[float, float]:
        clock = Clock(len(prompts))

        def listener(number: int) -> Callable[[Any], None]:
            return lambda output: clock.hear(number, output.is_finished())

        for number, (prompt, length) in enumerate(zip(prompts, tokens, strict=True)):
            name = next(names)
            manager.register_result_handler(name, listener(number))
            manager.add_request(
                list(prompt), request_id=name, max_new_tokens=length, streaming=True, eos_token_id=NEVER
            )
        return await clock.told()

    return measure


def prompts(rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(20, 4000, (rows, length), generator=generator).tolist()


def lengths(rows: int, tokens: int, differ: bool) -> list[int]:
    drawn = random.Random(rows)
    return [drawn.randint(tokens // 8, tokens) if differ else tokens for _ in range(rows)]


def measured(measure: Measure) -> list[dict[str, Any]]:
    asyncio.run(measure(prompts(4, 10), [4] * 4))  # loaded, and warm
    found = []
    for rows, length, longest, differ in SCENES:
        tokens = lengths(rows, longest, differ)
        rounds = [asyncio.run(measure(prompts(rows, length), tokens)) for _ in range(3)]
        seconds, first = (statistics.median(values) for values in zip(*rounds, strict=True))
        answer = f"{min(tokens)}-{max(tokens)}" if differ else str(longest)
        found.append({"rows": rows, "prompt": length, "answer": answer, "rate": sum(tokens) / seconds, "first": first})

    async def late() -> tuple[float, float, float]:
        long = asyncio.create_task(measure(prompts(*LONG[:2]), [LONG[2]] * LONG[0]))  # type: ignore[arg-type]
        await asyncio.sleep(0.3)
        seconds, first = await measure(prompts(*LATE[:2]), [LATE[2]])
        return (await long)[0], first, seconds

    seconds, first, whole = (statistics.median(v) for v in zip(*[asyncio.run(late()) for _ in range(3)], strict=True))
    found.append({"rows": "late", "rate": LONG[0] * LONG[2] / seconds, "first": first, "whole": whole})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    section = ModelSection(dtype="fp32")
    served = Served("fork-tiny", "fork-tiny", section, None)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Settings(data=Path(folder)))
        voice = asyncio.run(engine.voice(served))
        found = {"tunefork": measured(ours(engine, voice))}
        engine.close()
    device, _ = choose_device(section)
    model = load_base(inspect_model(section), "text", (), device, torch.float32)
    room = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=512, allow_block_sharing=False)
    plain = GenerationConfig(do_sample=False, eos_token_id=NEVER)
    manager = model.init_continuous_batching(generation_config=plain, continuous_batching_config=room)
    manager.start()
    found["continuous"] = measured(theirs(manager))
    manager.stop()
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{torch.get_num_threads()} thread(s)")
    print(
        f"{'answers':>8} {'prompt':>7} {'tokens':>7} | {'tunefork: tokens/s':>19} {'first, s':>9} | {'continuous':>10}"
    )
    for a, b in zip(found["tunefork"], found["continuous"], strict=True):
        place = f"{a['rows']:>8} {a.get('prompt', ''):>7} {a.get('answer', ''):>7}"
        print(f"{place} | {a['rate']:10.0f} {a['first']:9.3f} | {b['rate']:10.0f} {b['first']:9.3f}")
        if "whole" in a:
            print(f"{'the late one has ended after':>24} {a['whole']:.3f} s | {b['whole']:.3f} s")


if __name__ == "__main__":
    main()
