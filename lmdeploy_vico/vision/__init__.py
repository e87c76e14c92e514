"""Tiling, InternViT, the ViR router and the projectors: torch and kernels, no LMDeploy."""
