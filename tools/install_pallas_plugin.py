"""Installs XLA's compiler for GPUs, of the JAX that is installed, into build/pallas_plugin: 1.1 GB, and nothing that runs."""

import subprocess
import sys
from pathlib import Path

import jax

folder = Path(__file__).absolute().parent.parent / "build" / "pallas_plugin" / jax.__version__
if not folder.exists():
    # An interrupted installation does not count.
    unfinished = folder.with_name(f"{folder.name}.part")
    packages = [f"{name}=={jax.__version__}" for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(unfinished)]
    subprocess.run([*command, *packages], check=True)
    unfinished.rename(folder)
