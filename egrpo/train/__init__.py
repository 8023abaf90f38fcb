"""The training job and what an iteration does."""
