"""What a measurement depends on besides its arguments: recorded beside every number."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(*packages: str) -> dict[str, Any]:
    """Commit, versions of Python, torch, transformers and `packages`, GPU or processor, threads and date."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", *packages)},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def add_environment(record: dict[str, Any], now: dict[str, Any]) -> None:
    """Adds what is measured with `now` to the "environments" of a record that grows from one run to the next.

    Args:
        record: changed in place; one with a single "environment" is turned into a list.
        now: as of `environment`.
    """
    earlier = record.setdefault("environments", [record.pop("environment")] if "environment" in record else [])
    if now not in earlier:
        earlier.append(now)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
