"""
`make bench`: what the agent costs, as ratios taken side by side in one run.

A number of this machine is worth nothing on another, and little an hour later: every figure is a ratio of two things
measured in turn (A B A B), its median with the least and the most beside it, and the noise of the machine noted.
"""
