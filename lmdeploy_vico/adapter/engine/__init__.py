"""The engine process: LMDeploy's language models, which accept visual tokens at given positions."""
