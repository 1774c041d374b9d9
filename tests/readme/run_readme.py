"""Runs every ```sh block of README.md that is not marked `no-run`, in a scratch folder, with this environment's tools.

A block's info string may say `sh no-run` (installs, downloads). `make` lines are left to the callers of this script.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```sh([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The shell blocks that a reader would run after installing."""
    return [body for info, body in BLOCK.findall(text) if "no-run" not in info]


def main() -> int:
    blocks = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    if not blocks:
        print("README.md has no runnable block")
        return 1
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        for block in blocks:
            print(f"$ {block.strip()}", flush=True)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=os.environ | {"PATH": path}, check=False
            )
            if done.returncode != 0:
                print(f"failed with exit code {done.returncode}")
                return 1
    print(f"{len(blocks)} blocks passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
