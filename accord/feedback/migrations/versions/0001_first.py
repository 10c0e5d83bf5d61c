"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0001", None, None, None


def upgrade() -> None:
    op.create_table(
        "people",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(200), nullable=False, unique=True),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("password", sa.String(300)),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "criteria",
        sa.Column("version", sa.String(80), primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "items",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("prompt_id", sa.String(500), nullable=False, unique=True),
        sa.Column("theme", sa.String(200), nullable=False),
        sa.Column("content", sa.JSON, nullable=False),
        sa.Column("completions", sa.JSON, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("gold", sa.JSON),
        sa.Column("priority", sa.Float, nullable=False),
        sa.Column("place", sa.Float, nullable=False),
        sa.Column("taken", sa.Integer, nullable=False),
        sa.Column("wanted", sa.Boolean, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_index("by_want", "items", ["kind", "wanted", "priority", "place"])
    op.create_table(
        "assignments",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("item", sa.Integer, sa.ForeignKey("items.id"), nullable=False),
        sa.Column("person", sa.Integer, sa.ForeignKey("people.id"), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("lease", sa.Float, nullable=False),
        sa.Column("opened", sa.Float, nullable=False),
        sa.Column("closed", sa.Float),
        sa.Column("draft", sa.JSON),
        sa.Column("label", sa.JSON),
        sa.Column("seconds", sa.Float),
        sa.Column("criterion", sa.String(80), sa.ForeignKey("criteria.version")),
        sa.UniqueConstraint("item", "person", "round"),
    )
    op.create_index("by_state", "assignments", ["state", "lease"])
    op.create_index("by_person", "assignments", ["person", "state", "closed"])
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("person", sa.Integer, sa.ForeignKey("people.id")),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("assignment", sa.Integer, sa.ForeignKey("assignments.id")),
        sa.Column("key", sa.String(100)),
        sa.Column("before", sa.JSON),
        sa.Column("after", sa.JSON),
        sa.UniqueConstraint("assignment", "key"),
    )


def downgrade() -> None:
    for table in ("events", "assignments", "items", "criteria", "people"):
        op.drop_table(table)
