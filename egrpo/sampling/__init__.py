"""Images of a model, by one process or several."""
