"""What people look at: plots as inline SVG."""
