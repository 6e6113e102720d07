"""What ``plan.py`` stands on, all of it torch-free; each file may use those before it.

availability: what is built. inventory: what the checkpoint holds. sizes: what a cut makes of it, in bytes.
resolve: a recipe with every default filled in, or refused. The search over recipes will live here too.
"""
