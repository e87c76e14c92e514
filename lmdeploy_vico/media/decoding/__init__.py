"""Files to pixels: which files, and how. Runs in processes of its own, which load nothing heavy."""
