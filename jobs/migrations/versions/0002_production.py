"""Memory classes, figures of reports, durable blocks, API keys, webhook deliveries and workers."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ID = sa.String(32)
TIME = sa.DateTime(timezone=True)
DOCUMENT = sa.JSON(none_as_null=True)
FLOAT: sa.Double[float] = sa.Double()
_OLD, _NEW = "attempt >= 1 AND attempt <= max_attempts", "attempt >= 1 AND fruitless >= 0 AND fruitless <= max_attempts"
_INDEXES = {
    "ix_jobs_status_queue_deadline": ["status", "queue_deadline"],
    "ix_jobs_memory_class_status_id": ["memory_class", "status", "id"],
    "ix_jobs_memory_class_status_announced_at_id": ["memory_class", "status", "announced_at", "id"],
    "ix_jobs_status_memory_class_queued_at": ["status", "memory_class", "queued_at"],
    "ix_jobs_owner_bytes_after": ["owner", "bytes_after"],
    "ix_jobs_fingerprint": ["fingerprint"],
}


def upgrade() -> None:
    """Give jobs their new columns, and make the four tables."""
    with op.batch_alter_table("jobs") as jobs:
        # A default for the rows that are there; taken away again below, since the code states every value.
        jobs.add_column(sa.Column("memory_class", sa.String(32), nullable=False, server_default="gpu.cpu"))
        jobs.add_column(sa.Column("bytes_after", sa.BigInteger()))
        jobs.add_column(sa.Column("retention", FLOAT))
        jobs.add_column(sa.Column("fingerprint", sa.String(64)))
        jobs.add_column(sa.Column("request_id", sa.String(64)))
        jobs.add_column(sa.Column("trace_parent", sa.String(64)))
        jobs.add_column(sa.Column("fruitless", sa.Integer(), nullable=False, server_default="0"))
    # Attempts that were lost so far are counted as if none of them had kept anything, as was the case.
    op.execute("UPDATE jobs SET fruitless = attempt - 1")
    op.execute("UPDATE jobs SET announced_at = queued_at WHERE announced_at IS NULL")
    figures = "bytes_after", "retention"
    if op.get_bind().dialect.name == "postgresql":
        types = "bigint", "double precision"
        filled = ", ".join(f"{name} = (result->>'{name}')::{kind}" for name, kind in zip(figures, types, strict=True))
    else:
        filled = ", ".join(f"{name} = json_extract(result, '$.{name}')" for name in figures)
    op.execute(f"UPDATE jobs SET {filled} WHERE status = 'succeeded' AND result IS NOT NULL")
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("memory_class", server_default=None)
        jobs.alter_column("fruitless", server_default=None)
        jobs.alter_column("announced_at", existing_type=TIME, nullable=False)
        jobs.drop_constraint(op.f("ck_jobs_attempt_in_range"), type_="check")
        jobs.create_check_constraint(op.f("ck_jobs_attempt_in_range"), _NEW)
    for name, columns in _INDEXES.items():
        op.create_index(name, "jobs", columns)
    with op.batch_alter_table("job_attempts") as attempts:
        attempts.add_column(sa.Column("queued_at", TIME))
        attempts.add_column(sa.Column("figures", DOCUMENT))
    op.create_index("ix_job_attempts_ended_at", "job_attempts", ["ended_at"])
    _create_tables()


def downgrade() -> None:
    """Take them back; a job that was tried more often than may be counted is set to its last attempt."""
    for table in ("workers", "webhook_deliveries", "api_keys", "job_blocks"):
        op.drop_table(table)
    for name in _INDEXES:
        op.drop_index(name, "jobs")
    op.drop_index("ix_job_attempts_ended_at", "job_attempts")
    with op.batch_alter_table("job_attempts") as attempts:
        attempts.drop_column("figures")
        attempts.drop_column("queued_at")
    op.execute("UPDATE jobs SET attempt = max_attempts WHERE attempt > max_attempts")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_constraint(op.f("ck_jobs_attempt_in_range"), type_="check")
        jobs.create_check_constraint(op.f("ck_jobs_attempt_in_range"), _OLD)
        jobs.alter_column("announced_at", existing_type=TIME, nullable=True)
        for name in ("memory_class", "bytes_after", "retention", "fingerprint", "request_id", "trace_parent", "fruitless"):
            jobs.drop_column(name)


def _create_tables() -> None:
    op.create_table(
        "job_blocks",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("job_id", ID, sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("files", DOCUMENT, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
    )
    op.create_index("ix_job_blocks_created_at", "job_blocks", ["created_at"])
    op.create_table(
        "api_keys",
        sa.Column("id", ID, primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("scopes", DOCUMENT, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("hint", sa.String(16), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME),
        sa.Column("revoked_at", TIME),
        sa.UniqueConstraint("sha256", name=op.f("uq_api_keys_sha256")),
    )
    op.create_index("ix_api_keys_owner", "api_keys", ["owner"])
    _create_webhook_deliveries()
    op.create_table(
        "workers",
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("classes", DOCUMENT, nullable=False),
        sa.Column("device", sa.String(255), nullable=False),
        sa.Column("job_id", ID),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("last_seen", TIME, nullable=False),
    )


def _create_webhook_deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", ID, primary_key=True),
        sa.Column("job_id", ID, sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("receiver", sa.String(300), nullable=False),
        sa.Column("payload", DOCUMENT, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("due_at", TIME, nullable=False),
        sa.Column("status_code", sa.Integer()),
        sa.Column("error", sa.String(1024)),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("delivered_at", TIME),
    )
    op.create_index("ix_webhook_deliveries_job_id", "webhook_deliveries", ["job_id"])
    op.create_index("ix_webhook_deliveries_state_due_at", "webhook_deliveries", ["state", "due_at"])
