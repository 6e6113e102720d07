"""Jobs, their labels, events and attempts, and the idempotency keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.String(32)
FRACTION: sa.Double[float] = sa.Double()
TIME = sa.DateTime(timezone=True)
DOCUMENT = sa.JSON(none_as_null=True)
STATUS = sa.Enum(
    "queued", "running", "cancelling", "succeeded", "failed", "cancelled", "expired",
    name="status", native_enum=False, length=16, create_constraint=True,
)  # fmt: skip


def upgrade() -> None:
    """Create the five tables."""
    _create_jobs()
    op.create_table(
        "job_labels",
        _job_id(key=True),
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("value", sa.String(1024), nullable=False),
    )
    op.create_index("ix_job_labels_name_value", "job_labels", ["name", "value"])
    op.create_table(
        "job_events",
        _job_id(key=True),
        sa.Column("seq", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("data", DOCUMENT, nullable=False),
    )
    _create_job_attempts()
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("method", sa.String(8), primary_key=True),
        sa.Column("path", sa.String(255), primary_key=True),
        sa.Column("key_hash", sa.String(64), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        _job_id(key=False),
        sa.Column("created_at", TIME, nullable=False),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def downgrade() -> None:
    """Drop them."""
    for table in ("idempotency_keys", "job_attempts", "job_events", "job_labels", "jobs"):
        op.drop_table(table)


def _job_id(*, key: bool) -> sa.Column[str]:
    return sa.Column("job_id", ID, sa.ForeignKey("jobs.id"), primary_key=key, nullable=False)


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", ID, primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("model", sa.String(4096), nullable=False),
        sa.Column("status", STATUS, nullable=False),
        sa.Column("stage", sa.String(32)),
        sa.Column("status_reason", DOCUMENT),
        sa.Column("progress", DOCUMENT, nullable=False),
        sa.Column("fraction", FRACTION, nullable=False),
        sa.Column("noted_at", TIME),
        sa.Column("noted_fraction", FRACTION, nullable=False),
        sa.Column("request", DOCUMENT, nullable=False),
        sa.Column("resolved", DOCUMENT, nullable=False),
        sa.Column("plan", DOCUMENT),
        sa.Column("result", DOCUMENT),
        sa.Column("report", DOCUMENT),
        sa.Column("manifest", DOCUMENT),
        sa.Column("artifact_prefix", sa.String(128)),
        sa.Column("labels", DOCUMENT, nullable=False),
        sa.Column("spec_hash", sa.String(64), nullable=False),
        sa.Column("retry_of", ID),
        *_lease_columns(),
        *(sa.Column(name, TIME, nullable=False) for name in ("created_at", "queued_at")),
        *(sa.Column(name, TIME) for name in ("started_at", "cancelling_at", "finished_at", "deleted_at")),
        sa.Column("last_seq", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.CheckConstraint("attempt >= 1 AND attempt <= max_attempts", name="attempt_in_range"),
    )
    op.create_index("ix_jobs_owner_id", "jobs", ["owner", "id"])
    op.create_index("ix_jobs_status_id", "jobs", ["status", "id"])
    op.create_index("ix_jobs_status_lease_until", "jobs", ["status", "lease_until"])


def _lease_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("lease_until", TIME),
        sa.Column("worker", sa.String(255)),
        sa.Column("not_before", TIME),
        sa.Column("announced_at", TIME),
        sa.Column("max_runtime_s", sa.Integer(), nullable=False),
        sa.Column("max_queue_s", sa.Integer(), nullable=False),
        sa.Column("run_deadline", TIME),
        sa.Column("queue_deadline", TIME),
    ]


def _create_job_attempts() -> None:
    op.create_table(
        "job_attempts",
        _job_id(key=True),
        sa.Column("fence", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(255), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("lease_until", TIME, nullable=False),
        sa.Column("ended_at", TIME),
        sa.Column("outcome", sa.String(32)),
        sa.Column("code", sa.String(64)),
        sa.Column("message", sa.String(4096)),
    )
