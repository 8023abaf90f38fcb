"""``python -m egrpo``: the same commands as the ``egrpo`` script; workflow rules call this."""

import sys

from egrpo.warm import run

if __name__ == "__main__":
    status = run(sys.argv[1:]) if sys.argv[1:2] == ["make"] else None
    if status is not None:
        sys.exit(status)
    from egrpo.cli import main

    main()
