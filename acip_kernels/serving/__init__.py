"""Compressed models behind other people's servers: transformers' own, and vLLM's."""
