"""The argument parser of the commands that take no training configuration."""

from __future__ import annotations

import argparse


def argument_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """For `python -m scripts.NAME`, with the module's docstring, unwrapped, for --help."""
    prog = f"python -m scripts.{name}"
    return argparse.ArgumentParser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
