"""On the path of a job: which modules of the package it has loaded when it ends."""

import atexit
import os
import sys
from pathlib import Path


def note() -> None:
    """A file by stage and process: the words of the command, then modules, one a line."""
    if sys.argv[1:2] == ["make"]:
        loaded = sorted(name for name in sys.modules if name.startswith("egrpo."))
        path = Path(os.environ["NOTED"], f"{sys.argv[2]}-{os.getpid()}")
        path.write_text("\n".join([" ".join(sys.argv[3:]), *loaded]))


if "NOTED" in os.environ:
    atexit.register(note)
