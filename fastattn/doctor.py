"""`fastattn doctor`: versions, and what each backend says of this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

__all__ = ["add_arguments", "run"]

PACKAGES = ("torch", "transformers", "peft", "triton", "scikit-learn", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    import torch

    import fastattn
    from fastattn import dispatch

    print(f"fastattn {fastattn.__version__}")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            print(f"  {package:<14} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package:<14} not installed")
    print(f"Processor: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    print(f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can use'}")
    print("Backends")
    for status in fastattn.backends():
        print(f"  {status}")
        for line in dispatch.details(status.name) if status.name != "reference" else ():
            print(f"    {line}")
    return 0
