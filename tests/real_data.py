"""Where the tests with real data find it: the folder that RLHF_RAY_DATA names, else shared/data beside the repository."""

import os
from pathlib import Path

DATA = Path(os.environ.get("RLHF_RAY_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data")
