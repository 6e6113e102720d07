"""A report as a page: pure functions from figures to inline SVG, and one template around them. Loads no torch."""
