"""Runs migrations on the connection that ``jobs.database.migrate`` opened and locked."""

from alembic import context

from jobs.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a table in place; batch mode copies it.
)
with context.begin_transaction():
    context.run_migrations()
