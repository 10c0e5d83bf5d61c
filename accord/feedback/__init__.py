"""Judgements of completions: the criterion, and labelers who rank by it. Imports from ``data`` and the ground.

The labelers here are *simulated*. A page for people will hand over the same records
(:class:`accord.data.records.RankedCompletions`), so nothing after this floor knows the difference.
"""
