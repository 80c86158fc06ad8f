"""Runs a recipe: checks it, keeps the run's folder, and carries out the stages."""
