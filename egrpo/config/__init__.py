"""Settings: models, loading and merging."""
