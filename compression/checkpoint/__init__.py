"""One checkpoint on disk, a block at a time. Imports nothing: headers.py is read without torch."""
