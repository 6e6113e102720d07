"""Analysis looks and does not touch: tables out of a study, and the sentences that they support.

* ``likeness.py``: how alike are the experts' matrices, and are their neurons in the same order? Needs live weights, no text.
* ``routing.py``: how often is each expert chosen, how evenly, with whom; does the router prefer loud experts?
* ``similarity.py``: do experts answer alike; do router rows tell what experts do; how much is each layer missed?
* ``findings.py``: what all that means for who wants to compress the model, each sentence with its numbers.
* ``tables.py``: everything above as plain data for the report.

Most of the questions are those of "A Closer Look into Mixture-of-Experts in Large Language Models", arXiv:2406.18219.
"""
