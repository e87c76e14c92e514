"""Serve InternVL3.5-Flash (ViCO) models with LMDeploy.

Importing this package loads nothing heavy: `lmdeploy_vico.autoload` is called by `import torch` in every process.
"""

__version__ = '0.1.0'
