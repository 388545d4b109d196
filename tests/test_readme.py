"""The README's code runs, and the files that it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 2
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    assert names["gradients"][0].shape == (1, 4096, 8, 64)
    assert bool((abs(names["gradients"][1]) > 0).any())
    assert names["out"].shape == names["query"].shape


def test_readme_shows_code_on_the_first_screen():
    lines = README.splitlines()
    assert lines.index("```python") < 25
    assert len(lines) <= 150


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[`(]((?:\w+/)+[\w.]*)[`)]", README))))
def test_readme_paths_exist(path):
    made_by_running = {"demo_out/"}
    assert path in made_by_running or (ROOT / path).exists()


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
