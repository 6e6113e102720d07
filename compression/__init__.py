"""slimtrim's library: make Mixture-of-Experts checkpoints smaller, a block at a time.

recipe, plan: what is asked and what will happen. pipeline: the run, as a table of contents.
sweep: how blocks are walked. slimming, trimming: the methods. checkpoint: files on disk.
evaluation: what was lost. This file imports nothing, so that reading a recipe never loads torch.
"""
