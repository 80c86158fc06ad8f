"""Deciding what to remove: statistics, importance, factorisation, budget → plan."""
