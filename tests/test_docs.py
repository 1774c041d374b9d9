"""The words are kept true: links lead somewhere, the recipe page is current, every preset and command is named."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tunefork.tasks import list_tasks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


def test_links_lead_to_files() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not target.startswith("http") and not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_recipe_page_is_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_recipe.py", "--check"], check=False, cwd=ROOT)
    assert done.returncode == 0, "run: python docs/make_recipe.py"


def test_the_pictures_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "make_pictures.py", tmp_path], check=True, cwd=ROOT)
    made, kept = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path, ROOT / "docs/pictures"))
    assert made == kept, "run: python docs/make_pictures.py"


def test_the_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = "train evaluate compare predict chat export report methods tasks demo doctor serve keys"
    missing = [name for name in [*commands.split(), "data check", "data show"] if f"`{name}`" not in readme]
    assert missing == []


def test_the_readme_names_every_extra() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - {"test", "dev"}
    assert [extra for extra in sorted(extras) if f"`{extra}`" not in readme] == []
    install = re.search(r"pip install \.\s+# or '\.\[(.*)\]'", readme)
    assert install is not None
    assert set(install[1].split(",")) == extras


def test_presets_are_listed_with_their_source() -> None:
    kinds = {"classification", "choice", "generation", "chat", "preference", "scoring"}
    published = [info for info in list_tasks() if info.name not in kinds]
    assert len(published) >= 17
    assert all(info.summary for info in published)
