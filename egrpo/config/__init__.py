"""Settings: models, loading and merging."""

from egrpo.config.models import RunConfig, StudyConfig

__all__ = ["RunConfig", "StudyConfig"]
