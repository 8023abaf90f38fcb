"""The mathematics: pure functions over explicit arrays. No files, network or settings."""
