"""What knows transformers: which layers of a model are linear, how models are saved and loaded."""
