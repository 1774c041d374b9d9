"""Line budget of src: a file under 400 lines, all of it under 30,700. Raised only with the reason in the commit."""

import sys
from pathlib import Path

FILE, TOTAL = 400, 30_700

counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted(Path("src").rglob("*.py"))}
too_long = {path: lines for path, lines in counts.items() if lines > FILE}
total = sum(counts.values())
print(f"src: {total:,} lines in {len(counts)} files; longest {max(counts.values())}")
for path, lines in too_long.items():
    print(f"{path}: {lines} lines, more than {FILE}")
sys.exit(1 if too_long or total > TOTAL else 0)
