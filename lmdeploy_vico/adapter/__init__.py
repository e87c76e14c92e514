"""Where LMDeploy is met: the changes to it, what serves a request in its API process, and the model in its engine."""
