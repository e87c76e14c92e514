"""The room that imports LMDeploy: registration, request to prompt, the engine-side module."""
