"""What a model is worth: perplexity and divergence on text."""
