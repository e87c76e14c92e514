"""The stages of training: initialisation, consistency training, loss ratios, router training."""
