"""How a policy learns from scores: advantages, the KL penalty, objectives, algorithms and their trainer.

Imports from ``reward``, ``rollout``, ``data`` and the ground.
"""
