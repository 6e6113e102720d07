"""The engine room: claims a job, runs the library on it in a process of its own, stores the result.

Nothing here imports torch; only ``worker.child``, a freshly exec'ed process per job, ever does. The database row says
who holds a job (``jobs.attempts``); a message, a worker or a child may die at any moment and cost only time.
"""
