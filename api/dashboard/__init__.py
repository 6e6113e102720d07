"""The dashboard: pages at ``/`` for people, made from the same functions and rows as the JSON of ``/v1``.

It never calls the service's own HTTP. Pages are whole without the script; the script adds what moves.
"""
