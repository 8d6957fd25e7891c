"""The reference model: frozen, and its log-probs computed once into a cache."""
