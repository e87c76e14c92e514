"""The reader's first lessons, before it is made a ViCO model: seeing, then answering."""
