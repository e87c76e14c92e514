"""The differentiable ViCO model, its weights from and to the published layout, and the losses on it."""
