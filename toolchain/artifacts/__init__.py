"""What ships: one file for each kind of artifact."""
