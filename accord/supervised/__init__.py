"""Learning from examples of what to write: supervised fine-tuning (Ouyang et al. 2022, step 1).

It imports from the floors below: rollout, data, text, nn. Reward and reinforcement learning begin with what comes out of it.
"""
