"""Changing a model by a plan: mask, slice, split, save, rebuild."""
