"""``python -m egrpo``: the same commands as the ``egrpo`` script; workflow rules call this."""

from egrpo.cli import main

if __name__ == "__main__":
    main()
