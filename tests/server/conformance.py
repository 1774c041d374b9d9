"""openai-python's own tests of what is served here, against a seeded server: `make conformance`.

They come at run time from the source archive of the installed version. Where it cannot be had, that is said, and
nothing has failed. What those tests prove is shapes; what the service does is tested beside this file.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from tests.server.scenes import free_port, pip_refuses, server_answers, wait_for

RESOURCES = "tests/api_resources"
SERVED = ("test_files.py", "test_uploads.py", "uploads", "fine_tuning", "test_models.py", "test_completions.py")
CREATED = "chat/test_completions.py"  # stored chats are not served: only the tests that create one are run
LATER = "fine_tuning/alpha"  # graders
NEEDED = ("pytest-asyncio", "respx", "httpx-aiohttp")  # by those tests
SECONDS = 600


def main() -> int:
    version = importlib.metadata.version("openai")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for what, command in {
            f"the source archive of openai {version}": ("download", "--no-binary", "openai", "-d", folder),
            " and ".join(NEEDED): ("install", "--target", str(place / "needed"), *NEEDED),
        }.items():
            more = ("--no-deps", f"openai=={version}") if command[0] == "download" else ()
            if why := pip_refuses(*command, *more):
                print(f"conformance: skipped, since {what} cannot be had here ({why})")
                return 0
        with tarfile.open(next(place.glob("openai-*.tar.gz"))) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
            archive.extractall(place)
        source = place / f"openai-{version}"
        later = len(list((source / RESOURCES / LATER).glob("test_*.py")))
        counts = _against_server(source, place / "needed")
    total: Counter[str] = Counter()
    for name, found in sorted(counts.items()):
        print(f"{name:48} {found['passed']:4} passed {found['failed']:4} failed {found['skipped']:4} skipped")
        total += found
    print(f"conformance with openai {version}: {total['passed']} passed, {total['failed']} failed, ", end="")
    print(f"{total['skipped']} skipped by their authors; {later} file of grader tests left out (not served yet)")
    return 0 if total["passed"] and not total["failed"] else 1


def _against_server(source: Path, needed: Path) -> dict[str, Counter[str]]:
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "tests.server.seeded", str(port)])
    root = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: server.poll() is not None or server_answers(f"{root}/healthz"))
        own = os.pathsep.join([str(needed), str(source)])
        surroundings = {**os.environ, "PYTHONPATH": own, "TEST_API_BASE_URL": f"{root}/v1"}
        found: dict[str, Counter[str]] = {}
        for number, chosen in enumerate(
            ([f"{RESOURCES}/{name}" for name in SERVED], [f"{RESOURCES}/{CREATED}", "-k", "create"])
        ):
            report = source / f"report{number}.xml"
            options = ["-q", "-n0", "-o", "addopts=", "-o", "filterwarnings=default", f"--junitxml={report}"]
            options += ["--tb=short", f"--ignore={RESOURCES}/{LATER}"]
            command = [sys.executable, "-m", "pytest", *options, *chosen]
            subprocess.run(command, cwd=source, env=surroundings, timeout=SECONDS, check=False)
            for case in ElementTree.parse(report).iter("testcase"):
                name = case.get("classname", "").removeprefix("tests.api_resources.").rpartition(".")[0]
                outcome = "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"
                found.setdefault(name, Counter())["skipped" if case.find("skipped") is not None else outcome] += 1
        return found
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
