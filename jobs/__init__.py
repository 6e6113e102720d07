"""What the API and the worker share. No torch and no FastAPI here.

The database row is the truth; a message only says "look at this id".

    rows            tables, database, clock, ids, status; moves, endings (how a job changes), migrations/
    who asks        repository (callers), attempts (workers), upkeep (the service itself), blocks, events, reports, key_rows,
                    census, webhooks, workers, waiting_lines: each the queries of one side, all given by ``database.unit_of_work``
    the queue       queue, transports (the wake-up call), turn (one upkeep at a time)
    files           storage/ (results), sources, hub, buckets, bucket_files (models and texts)
    who may what    keys, key_commands, secret, receivers (where webhooks may go), one_machine (what must not be shared)
    processes       settings, serve, tether, alive, logs, traces, errors
"""
