"""How optimizers behave under the operations of PyTorch, its trainers and its users: the table of docs/conformance.md.

python benchmarks/conformance.py --write docs/conformance.md     # about a minute; needs pytorch_optimizer
python benchmarks/conformance.py --explain "SCALE"               # the checks that fail or are refused, and why
"""

import argparse
import datetime
import importlib.metadata
import logging
import platform
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))

from conformance_report import CHECKS, OTHERS, OURS, page, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page to this file instead of printing it")
    parser.add_argument("--explain", metavar="NAME", help="print the checks that an optimizer does not pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.explain:
        subject = next((s for s in OTHERS + OURS if s.name == options.explain), None)
        if subject is None:
            parser.error(f"--explain takes one of: {', '.join(s.name for s in OTHERS + OURS)}")
        for entry in CHECKS:
            found, said = verdict(entry, subject)
            if found != "passes":
                print(f"{found}: {entry.title}: {said}")
        return
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pytorch_optimizer", "evenstep")
    )
    today = datetime.datetime.now(datetime.UTC).date()
    text = page(f"Measured on {today} with {versions}, Python {platform.python_version()}, on a CPU.")
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
