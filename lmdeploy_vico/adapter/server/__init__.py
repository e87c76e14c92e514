"""The API process: requests are checked, images encoded and prompts assembled before LMDeploy's engine sees them."""
