"""Settings: models, loading and merging, generated documents."""

from egrpo.config.models import RunConfig, StudyConfig

__all__ = ["RunConfig", "StudyConfig"]
