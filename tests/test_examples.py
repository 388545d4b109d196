"""Every script in examples/ runs, and the demo makes all of its outputs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["attention.py", "selector.py", "flax_linen.py", "flax_nnx.py"]
FIGURES = ["loss_curves.png", "scaling.png", "selected_blocks.png"]
TINY = """--steps=3 --batch_size=1 --sequence_length=128 --validation_batches=1 --d_model=16 --num_layers=2 --mlp_dim=32
  --prompt=import --block_size=32 --top_k=3 --num_local_blocks=1 --generate_bytes=24 --scaling_lengths=128""".split()


def run(script: str, *arguments: object) -> str:
    """Standard output of a script of examples/, run as the README says."""
    pytest.importorskip("optax")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Compilation is nearly all of the time.
    environment = os.environ | dict(PYTHONPATH=path, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    command = [sys.executable, f"examples/{script}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def numbers(tree) -> list[float]:
    """Every number in what a JSON file holds."""
    if isinstance(tree, dict | list):
        return [x for child in (tree.values() if isinstance(tree, dict) else tree) for x in numbers(child)]
    return [tree] if isinstance(tree, int | float) else []


def test_every_script_is_tested():
    scripts = {path.name for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("lm_")}
    assert scripts == {*SMALL, "train_lm.py", "serve.py"}  # the last in test_serve.py


@pytest.mark.parametrize("script", SMALL)
def test_small_example_runs(script):
    assert run(script).strip()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the standard output of the smallest run of the demo."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    out = tmp_path_factory.mktemp("demo")
    return out, run("train_lm.py", *TINY, f"--out={out}")


@pytest.mark.slow
def test_demo_writes_finite_numbers(demo):
    out, printed = demo
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["models"]) == {"dense", "sparse"} and len(summary["scaling"]) == 3
    assert all(math.isfinite(x) for x in numbers(summary))
    assert all(0 < model["validation_bits_per_byte"] < 12 for model in summary["models"].values())
    assert 0 < summary["fraction_of_past_blocks_read"] < 1
    assert "sparse against dense" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_demo_draws_figure(demo, name):
    assert_drawn(demo[0] / name)


def assert_drawn(path: Path) -> None:
    """An image that is large enough, and neither empty nor full."""
    import matplotlib.image

    image = matplotlib.image.imread(path)[..., :3]
    height, width, _ = image.shape
    assert min(height, width) >= 400
    is_background = np.all(image == image[0, 0], axis=-1)
    assert 0.02 < 1 - is_background.mean() < 0.98


@pytest.mark.slow
def test_checkpoint_generates_what_its_run_did(demo):
    written = (demo[0] / "generated.txt").read_text().split("--- generated (24 bytes)\n")[1]
    arguments = [f"--generate_from={demo[0] / 'sparse_lm.msgpack'}", "--prompt=import", "--generate_bytes=24"]
    assert run("train_lm.py", *arguments) == "import" + written
    assert len(written.encode()) > 24
