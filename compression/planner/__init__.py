"""What ``plan.py`` stands on, all of it torch-free; each file may use those before it.

availability: what is built. inventory: what the checkpoint holds. sizes: what a cut makes of it, in bytes.
resolve: a recipe with every default filled in, or refused. smallest: the least that any recipe leaves.
warnings: what the caller should know. The search over recipes will live here too.
"""
