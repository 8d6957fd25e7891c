"""Hugging Face causal LMs: loading them, and their log-probs computed without logits."""
