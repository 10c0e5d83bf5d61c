"""Reference against aligned on the same prompts with the same luck, and the report a person reads.

Imports from ``rl``, ``reward``, ``feedback``, ``rollout``, ``data`` and the ground.
"""
