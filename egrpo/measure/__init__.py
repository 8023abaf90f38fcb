"""What a model is asked: embeddings, profile, evaluation, suffixes."""
