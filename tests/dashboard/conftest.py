"""The synthetic study of tests/study is used here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "study"))
