"""What ``plan.py`` stands on, all of it torch-free; each file may use those before it.

availability: what is built. inventory: what the checkpoint holds. sizes: what a cut makes of it, in bytes.
resolve: a recipe with every default filled in, or refused. smallest: the least that any recipe leaves.
warnings: what the caller should know.

The search over recipes: prices: what each lever costs, and prior: what it usually costs. levers: what is left open. weights: the
bytes of a block, lever by lever. options: what can become of a block. pairs: what drops cost together. program: the best option
for every block, by ``milp``. steps: a plan as a recipe. search: the best plan, its rivals, the frontier. choice: which of the
plans that were tried to follow. known: prices that were measured before.
"""
