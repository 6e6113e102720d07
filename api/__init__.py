"""The HTTP face. Parse, call ``jobs`` and the torch-free half of ``compression``, answer. Nothing here runs a model."""
