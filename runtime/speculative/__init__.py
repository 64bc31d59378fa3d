"""Tokens guessed ahead, for one step to verify: where they come from, and when they stand."""
