"""A run as a folder to share."""
