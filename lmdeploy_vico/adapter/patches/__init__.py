"""Every change to LMDeploy, by process: what it changes, why, and when it can go.

The tables import nothing of LMDeploy, which may be half imported when they are read.
"""
