"""Scores for completions: the reward model and its training, classifiers, a user's functions, and their weighted sum.

Imports from ``supervised``, ``rollout``, ``data`` and the ground.
"""
