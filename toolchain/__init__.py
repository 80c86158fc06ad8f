"""slimvit: compress a timm Vision Transformer and prove what it became."""
