"""Completions out of a policy: the policy itself, the decoder with its cache, and batches of what it wrote.

Imports from ``data`` and the ground.
"""
