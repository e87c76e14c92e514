"""The vision side: its rates against those of LMDeploy, and the switches of its ViT."""
