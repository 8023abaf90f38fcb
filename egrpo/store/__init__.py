"""What is kept on disk: files whole or not at all, Parquet tables, journal, checkpoints."""
