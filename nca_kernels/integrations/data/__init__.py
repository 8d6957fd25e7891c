"""Reward data: read from files and the hub, tokenized, and put into batches of K responses a prompt."""
