"""What the model is fitted to and compared with: the paper's Table 4, and ratios measured on a CPU."""
