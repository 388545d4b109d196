"""Compiles the Pallas kernels for GPUs that are not here with every minor version of JAX that can, each in an environment.

python tools/pallas_versions.py [0.11 ...]
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
VERSIONS = ("0.11", "0.12")


def main(versions: list[str]) -> None:
    for version in versions or VERSIONS:
        folder = ROOT / "build" / f"jax-{version}"
        python = str(folder / "bin" / "python")
        print(f"JAX {version} in {folder.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--editable",
            f"{ROOT}[test]",
            f"jax=={version}.*",
            f"jaxlib=={version}.*",
        ]
        subprocess.run(install, check=True, env=os.environ | dict(SPARSE_ATTN_CUDA="OFF"))
        subprocess.run([python, str(ROOT / "tools" / "install_pallas_plugin.py")], check=True)
        subprocess.run([python, "-m", "pytest", "-q", "tests/test_compiled_pallas.py"], check=True, cwd=ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
