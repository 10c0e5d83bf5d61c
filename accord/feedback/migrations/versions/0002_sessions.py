"""Invitations, sessions, what a store knows of itself, and how often an item was answered."""

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None


def upgrade() -> None:
    op.create_table(
        "invitations",
        sa.Column("token", sa.String(64), primary_key=True),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("taken_by", sa.Integer, sa.ForeignKey("people.id")),
    )
    op.create_table(
        "sessions",
        sa.Column("token", sa.String(64), primary_key=True),
        sa.Column("person", sa.Integer, sa.ForeignKey("people.id"), nullable=False),
        sa.Column("csrf", sa.String(64), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("used", sa.Float, nullable=False),
    )
    op.create_table("about", sa.Column("name", sa.String(40), primary_key=True), sa.Column("value", sa.JSON, nullable=False))
    op.add_column("assignments", sa.Column("answered", sa.Float))
    op.add_column("assignments", sa.Column("answers", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE assignments SET answered = closed, answers = 1 WHERE closed IS NOT NULL")


def downgrade() -> None:
    with op.batch_alter_table("assignments") as assignments:
        assignments.drop_column("answers")
        assignments.drop_column("answered")
    op.drop_table("about")
    op.drop_table("sessions")
    op.drop_table("invitations")
