"""Publishes a run: as a repository of a hub with a card, and as a bill of materials."""
