"""What a run will need on this machine: memory by part, tokens and time by stage, before any weight is read.

Memory is counted from ``config.json``, the settings and the rows; what a layer keeps for its backward pass is counted
on one layer of that shape. Time is measured: the run's own code works for a few seconds on a random model of the same
shape, and its pace is multiplied out. Completions are assumed to use their whole length, so time is an upper estimate
where a policy ends earlier.
"""
