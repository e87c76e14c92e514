"""Every change to LMDeploy, each with its reason and the condition for its removal."""
