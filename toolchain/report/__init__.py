"""What a run found, as JSON, as Markdown and on the terminal."""
