"""What a workflow rule runs: one module per rule."""
