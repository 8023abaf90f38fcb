"""What settings and files make together: runs, paths, identities."""
