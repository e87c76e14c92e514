"""TurboMind, LMDeploy's engine in C++, as the engine of a ViCO checkpoint's language model.

Experimental: docs/turbomind.md says what no GPU has proven yet.
"""
