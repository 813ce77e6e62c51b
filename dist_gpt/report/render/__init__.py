"""Render the report's document as HTML, Markdown, terminal text and figures."""
