"""Make the shipped documents model in INT8 again.

    TRILEVEL_DATA=... python scripts/documents_artifact.py [OUT]

Ranges of activations are those of the first 64 training documents of `docs/tech.jsonl.xz`; nothing is drawn at random.
Probes are text of the Python that runs this. Takes some minutes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trilevel.applications.documents.artifact import INT8, export_documents
from trilevel.applications.documents.evaluate import TECH
from trilevel.data.documents import load_jsonl

NUM_DOCUMENTS = 64


def main() -> int:
    """Write the artifact to the folder of the first argument, or in place of the shipped one."""
    data = os.environ.get("TRILEVEL_DATA")
    if not data:
        sys.stderr.write("error: set TRILEVEL_DATA to the folder of the data sets.\n")
        return 2
    documents = load_jsonl(Path(data) / TECH, split="train", limit=NUM_DOCUMENTS)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else INT8
    export_documents(None, out, calibration=documents)
    return 0


if __name__ == "__main__":
    sys.exit(main())
