"""What the figures were measured on, and how much memory it has."""

import ctypes
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import jax


def describe() -> dict[str, str | int | None]:
    """Device, versions and platform."""
    device = jax.devices()[0]
    return dict(
        device=cpu_name() if device.platform == "cpu" else device.device_kind,
        platform=device.platform,
        cores=num_cores(),
        python=platform.python_version(),
        jax=installed_version("jax"),
        jaxlib=installed_version("jaxlib"),
        torch=installed_version("torch"),
    )


def headline(machine: dict, seed: int) -> str:
    torch = f"torch {machine['torch']}" if machine["torch"] else "no torch"
    versions = f"jax {machine['jax']}, jaxlib {machine['jaxlib']}, {torch}, Python {machine['python']}"
    return f"{machine['device']} ({machine['platform']}), {machine['cores']} cores; {versions}; seed {seed}"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    """Without importing it."""
    found = [distribution.version for distribution in importlib.metadata.distributions(name=package)]
    return found[0] if found else None


def free_bytes() -> int | None:
    """Memory that a run may still take on the device; `None` where that cannot be told."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats()
        return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None
    return proc_bytes("/proc/meminfo", "MemAvailable")


def proc_bytes(path: str, field: str) -> int | None:
    """A field of a Linux status file, which counts in KiB."""
    if not Path(path).exists():
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB", Path(path).read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def measure_peak_rss(call) -> int | None:
    """Bytes by which the resident memory of this process rises at most during `call`; `None` where Linux does not tell."""
    status, reset = "/proc/self/status", Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        call()
        return None
    release_free_pages()
    reset.write_text("5")  # sets the high-water mark to what is resident now
    before = proc_bytes(status, "VmRSS")
    call()
    return max(0, proc_bytes(status, "VmHWM") - before)


def release_free_pages() -> None:
    """Gives memory that the C library holds for later back to the system, so that taking it again shows."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
