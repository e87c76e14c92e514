"""Runs LMDeploy's engine on a machine without a GPU."""
