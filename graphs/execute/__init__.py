"""Executing a weight plan: steps, jobs, shards."""
