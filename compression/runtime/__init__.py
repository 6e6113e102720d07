"""What ships inside artifacts of the custom profile: one file that opens them, with nothing of slimtrim installed."""
