"""K-way alignment as a transformers ``Trainer``."""
