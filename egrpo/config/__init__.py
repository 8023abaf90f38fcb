"""Settings: models, loading and merging."""

from egrpo.config.models import RunConfig
from egrpo.config.study import StudyConfig

__all__ = ["RunConfig", "StudyConfig"]
