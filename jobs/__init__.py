"""What the API and the worker share: rows and their legal moves, queries, the queue's wake-up call, settings.

No torch and no FastAPI here. The database row is the truth; a message only says "look at this id".
"""
