"""The networks of the vision side, with the names of the checkpoint: InternViT, the ViR router and the projectors."""
