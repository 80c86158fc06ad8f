"""The report of a run as JSON, Markdown, HTML and on the terminal."""
