"""One method a file, and what they share."""
