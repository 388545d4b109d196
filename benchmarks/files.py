"""Files that are whole whenever the program that writes them is ended."""

import json
import os
import tarfile
from pathlib import Path


def write_json(path: str | Path, data: dict) -> None:
    """Replaces the file at once, so that what was known before stays if this is not finished."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(unfinished, path)


def write_archive(path: str | Path, folder: Path) -> None:
    """All files of a folder as one compressed tar file, replaced at once; it may lie in that folder."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with tarfile.open(unfinished, "w:gz") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file not in (path, unfinished):
                archive.add(file, file.relative_to(folder.parent))
    os.replace(unfinished, path)
