"""Where text comes from: files, data sets of a hub, the request itself, what every CPython carries. Imports nothing."""
