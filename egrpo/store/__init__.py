"""Side effects on disk and tracking: atomic files, Parquet, journal, checkpoints, MLflow."""
