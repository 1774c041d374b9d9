"""Real kills: `python -m tests.recovery.sigkill_driver` forks a child for each point, which sends itself SIGKILL.

Reads {"scene", "template", "points": [[folder, call, when], ...]} from its input; prints how each child ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from tests.recovery import scenes
from tests.recovery.watched_os import WatchedOs
from tunefork import files


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    order = json.load(sys.stdin)
    scene = getattr(scenes, order["scene"])
    for folder, call, when in order["points"]:
        shutil.copytree(order["template"], folder)
        child = os.fork()
        if child == 0:
            watched = WatchedOs(die_at=call, when=when, die=_kill_self, really_sync=True)
            files.os = watched
            scene(Path(folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), flush=True)


if __name__ == "__main__":
    main()
